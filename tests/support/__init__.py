# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests need beside the product: guests, consoles, a QMP client of their own."""
