# SPDX-License-Identifier: LGPL-2.1-or-later
"""The snapshot file: FORMAT.md is its specification.

The C core (native/src) writes and reads it; :mod:`.slow` is a second reader
that shares nothing with the core.
"""
