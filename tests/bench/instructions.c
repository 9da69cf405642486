/*
 * A plugin for QEMU's TCG that counts what a guest executes, by phases: one begins whenever a program starts whose entry point is
 * among those named (entry=ADDRESS, hexadecimal). The counts are in a mapped file (out=FILE) and hold at every moment, so that
 * nothing is lost when QEMU is killed: for each phase three 64-bit numbers, instructions in the kernel, instructions in user mode,
 * and blocks translated. A block that is left early, by a fault, counts in full.
 *
 * The declarations are those of QEMU's plugin API, version 2 and later (include/qemu/qemu-plugin.h), whose header Debian does not
 * package.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*callback)(uint64_t id, struct qemu_plugin_tb *block));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, void (*callback)(unsigned int cpu, void *data),
					  enum qemu_plugin_cb_flags flags, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);

#define EXPORTED __attribute__((visibility("default")))
EXPORTED int qemu_plugin_version = 2;

enum { PHASES = 16, ENTRIES = 8 };

struct phase {
	uint64_t kernel, user, blocks;
};

struct block {
	uint32_t instructions;
	bool kernel, entry;
};

static struct phase *phase, *last;
static uint64_t entries[ENTRIES];
static size_t known;

static void executed(unsigned int cpu, void *data)
{
	const struct block *block = data;

	(void)cpu;
	if (block->entry && phase < last)
		phase++;
	if (block->kernel)
		phase->kernel += block->instructions;
	else
		phase->user += block->instructions;
}

static void translated(uint64_t id, struct qemu_plugin_tb *translation)
{
	uint64_t address = qemu_plugin_tb_vaddr(translation);
	/* Lives as long as the translation, which is as long as QEMU. */
	struct block *block = malloc(sizeof *block);

	(void)id;
	if (!block)
		abort();
	*block = (struct block){ qemu_plugin_tb_n_insns(translation), address >> 63, false };
	for (size_t i = 0; i < known; i++)
		block->entry |= entries[i] == address;
	phase->blocks++;
	qemu_plugin_register_vcpu_tb_exec_cb(translation, executed, QEMU_PLUGIN_CB_NO_REGS, block);
}

EXPORTED int qemu_plugin_install(uint64_t id, const void *info, int count, char **arguments)
{
	const char *out = NULL;
	size_t size = PHASES * sizeof *phase;
	int file;

	(void)info;
	for (int i = 0; i < count; i++) {
		if (!strncmp(arguments[i], "out=", 4))
			out = arguments[i] + 4;
		else if (!strncmp(arguments[i], "entry=", 6) && known < ENTRIES)
			entries[known++] = strtoull(arguments[i] + 6, NULL, 16);
		else
			return 1;
	}
	if (!out || (file = open(out, O_RDWR | O_CREAT | O_TRUNC, 0600)) < 0 || ftruncate(file, size))
		return 1;
	phase = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	if (phase == MAP_FAILED)
		return 1;
	last = phase + PHASES - 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
