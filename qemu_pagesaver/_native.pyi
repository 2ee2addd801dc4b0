# SPDX-License-Identifier: LGPL-2.1-or-later
# The extension that cffi makes of native/include/pagesaver.h. Its functions and
# structures are typed in native.py, the only module that imports it.
from typing import Any

ffi: Any
lib: Any
