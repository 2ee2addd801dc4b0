/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Multiboot header, entry, and the one interrupt that ends a HLT. */
        .set    MAGIC, 0x1badb002
        .set    FLAGS, 3                /* page aligned, memory map */

        .section .multiboot, "a"
        .align  4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)

        .text
        .global start
start:
        cli
        cld
        mov     $stack_top, %esp
        lgdt    gdt_pointer
        ljmp    $8, $1f
1:      mov     $16, %cx
        mov     %cx, %ds
        mov     %cx, %es
        mov     %cx, %ss
        push    %ebx                    /* multiboot information */
        push    %eax                    /* multiboot magic */
        call    kernel_main
2:      hlt
        jmp     2b

        .global serial_interrupt
serial_interrupt:                       /* the main loop looks at the UART */
        push    %eax
        mov     $0x20, %al
        out     %al, $0x20
        pop     %eax
        iret

        .data
        .align  8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff
        .quad   0x00cf92000000ffff
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .bss
        .align  16
        .skip   16384
stack_top:
        .section .note.GNU-stack, "", @progbits
