/*
 * Asks the kernel for the interfaces that container software needs and no shell can ask for. Prints one line
 * for each; the exit status is the number of those that are missing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/landlock.h>
#include <linux/memfd.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <net/if.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

static int missing;

static void expect(const char *what, int holds)
{
	printf("%s: %s\n", holds ? "ok" : "FAILED", what);
	missing += !holds;
}

static long bpf(int command, union bpf_attr *attributes)
{
	return syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

/* Loads "allow everything" as the device program of a cgroup, and attaches it to the root. */
static int device_program(void)
{
	struct bpf_insn allow[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr load = {
		.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE,
		.insns = (unsigned long)allow,
		.insn_cnt = 2,
		.license = (unsigned long)"GPL",
	};
	int program = bpf(BPF_PROG_LOAD, &load);
	int group = open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
	union bpf_attr attach = {
		.target_fd = group, .attach_bpf_fd = program, .attach_type = BPF_CGROUP_DEVICE,
	};
	return program >= 0 && bpf(BPF_PROG_ATTACH, &attach) == 0 && bpf(BPF_PROG_DETACH, &attach) == 0;
}

/* A filter that answers getppid with EXDEV, in a child. */
static int seccomp_filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EXDEV),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { sizeof code / sizeof *code, code };
	int status;

	if (fork() == 0) {
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
		if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter))
			_exit(1);
		_exit(!(syscall(SYS_getppid) == -1 && errno == EXDEV));
	}
	wait(&status);
	return status == 0;
}

static int tap(void)
{
	struct ifreq request = { .ifr_name = "tap0", .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	return ioctl(open("/dev/net/tun", O_RDWR), TUNSETIFF, &request) == 0;
}

int main(void)
{
	char parameters[120] = { 0 };
	struct mq_attr queue = { .mq_maxmsg = 1, .mq_msgsize = 8 };
	sigset_t signals;

	sigemptyset(&signals);
	expect("device access of a cgroup is decided by a BPF program", device_program());
	expect("seccomp filters system calls", seccomp_filter());
	expect("landlock answers with an ABI of at least 5",
	       syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) >= 5);
	expect("io_uring", syscall(SYS_io_uring_setup, 4, parameters) >= 0);
	expect("AIO", syscall(SYS_io_setup, 1, &(unsigned long){ 0 }) == 0);
	expect("userfaultfd", syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY) >= 0);
	expect("memfd", memfd_create("m", MFD_ALLOW_SEALING) >= 0);
	expect("memfd of huge pages", memfd_create("h", MFD_HUGETLB) >= 0);
	expect("inotify", inotify_init1(0) >= 0);
	expect("fanotify with permission events", fanotify_init(FAN_CLASS_CONTENT, O_RDONLY) >= 0);
	expect("eventfd", eventfd(0, 0) >= 0);
	expect("timerfd", timerfd_create(CLOCK_BOOTTIME, 0) >= 0);
	expect("signalfd", signalfd(-1, &signals, 0) >= 0);
	expect("pidfd", syscall(SYS_pidfd_open, getpid(), 0) >= 0);
	expect("System V shared memory", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0);
	expect("POSIX message queues", mq_open("/q", O_CREAT | O_RDWR, 0600, &queue) >= 0);
	expect("keyrings", syscall(SYS_keyctl, 0 /* KEYCTL_GET_KEYRING_ID */, -3, 1) > 0);
	expect("restartable sequences and membarrier", syscall(SYS_membarrier, 0, 0, 0) > 0);
	expect("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 1) >= 0);
	expect("protection keys are known", syscall(SYS_pkey_alloc, 0, 0) >= 0 || errno == ENOSPC || errno == EINVAL);
	expect("file handles", syscall(SYS_name_to_handle_at, AT_FDCWD, "/", NULL, NULL, 0) && errno == EFAULT);
	expect("vsock", socket(AF_VSOCK, SOCK_STREAM, 0) >= 0);
	expect("packet sockets", socket(AF_PACKET, SOCK_RAW, 0) >= 0);
	expect("IPv6", socket(AF_INET6, SOCK_DGRAM, 0) >= 0);
	expect("tap interfaces", tap());
	expect("physical memory cannot be opened", open("/dev/mem", O_RDONLY) < 0);
	return missing;
}
