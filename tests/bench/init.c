/* The least a machine can boot to: a program that ends it. Without a C library, for the smallest initial ramfs. */
void _start(void)
{
	/* reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART) */
	long number = 169;
	__asm__ volatile("syscall"
			 : "+a"(number)
			 : "D"(0xfee1dead), "S"(672274793), "d"(0x01234567)
			 : "rcx", "r11", "memory");
	for (;;)
		__asm__ volatile("pause");
}
