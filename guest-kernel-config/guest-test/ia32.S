# A program for 32-bit x86 that ends with status 42.
	.globl _start
_start:	mov $1, %eax
	mov $42, %ebx
	int $0x80
