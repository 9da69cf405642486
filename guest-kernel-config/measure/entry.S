# A kernel that does nothing but tell, on debug port 0xe9, what the time stamp counter is at its first
# instruction (8 bytes, low first), and end the machine by a triple fault. It is entered as QEMU enters a real one.

	.section .note, "a"
	.long 4, 4, 18				# XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.long _start

	.text
	.code32
	.globl _start
_start:
	rdtsc
	mov $8, %ecx
1:	out %al, $0xe9
	shrd $8, %edx, %eax
	shr $8, %edx
	loop 1b
	lidt no_interrupts
	ud2
no_interrupts:
	.word 0
	.long 0
