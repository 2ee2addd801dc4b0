# SPDX-License-Identifier: LGPL-2.1-or-later
"""The benchmark: everything side by side in one run, in interleaved pairs."""
