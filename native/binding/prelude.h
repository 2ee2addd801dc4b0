/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the generated cffi module includes before the interface. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pagesaver.h"
