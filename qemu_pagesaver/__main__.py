# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m qemu_pagesaver``."""

from __future__ import annotations

import sys

from qemu_pagesaver.cli import main

sys.exit(main())
