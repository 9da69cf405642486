/*
 * The first program of a measured boot: reads the clock before anything else, tells it on the console, and ends
 * the machine. With "kernel_log" in its environment (a word of the kernel's command line) it prints the log too.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#include <x86intrin.h>

static void print_kernel_log(FILE *console)
{
	/* One read is one record, and none is longer (CONSOLE_EXT_LOG_MAX). */
	char record[8192];
	int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
	ssize_t length;

	while ((length = read(log, record, sizeof record - 1)) > 0) {
		record[length] = 0;
		const char *text = strchr(record, ';');
		long long microseconds = 0;
		sscanf(record, "%*d,%*d,%lld", &microseconds);
		if (text)
			fprintf(console, "log %9lld %.*s\n", microseconds, (int)strcspn(text + 1, "\n"), text + 1);
	}
	close(log);
}

int main(void)
{
	unsigned long long now = __rdtsc();

	mkdir("/dev", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	FILE *console = fopen("/dev/hvc0", "w");
	if (console) {
		fprintf(console, "init at %llu\n", now);
		if (getenv("kernel_log"))
			print_kernel_log(console);
		fflush(console);
		tcdrain(fileno(console));
		/* The console's own thread empties its buffer; the host's acknowledgement is not visible here. */
		usleep(100000);
	}
	reboot(RB_AUTOBOOT);
	return 1;
}
