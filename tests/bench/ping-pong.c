/*
 * How long a byte takes there and back over TCP, which iperf3 does not tell.
 *
 *   ping-pong serve PORT             sends back what comes, to one client after the other
 *   ping-pong ADDRESS PORT ROUNDS    prints the median of the rounds' times in microseconds
 */
#include <arpa/inet.h>
#include <err.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { WARM_UP = 50 };

static int tcp_socket(void)
{
	int one = 1, tcp = socket(AF_INET, SOCK_STREAM, 0);

	if (tcp < 0 || setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one))
		err(1, "a TCP socket");
	return tcp;
}

static void no_delay(int tcp)
{
	int one = 1;

	if (setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
		err(1, "TCP_NODELAY");
}

static void serve(struct sockaddr_in at)
{
	int listening = tcp_socket();
	char byte;

	at.sin_addr.s_addr = INADDR_ANY;
	if (bind(listening, (struct sockaddr *)&at, sizeof at) || listen(listening, 1))
		err(1, "listening");
	for (;;) {
		int client = accept(listening, NULL, NULL);

		if (client < 0)
			err(1, "accept");
		no_delay(client);
		while (read(client, &byte, 1) == 1 && write(client, &byte, 1) == 1)
			;
		close(client);
	}
}

static long nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000L + now.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
	long x = *(const long *)a, y = *(const long *)b;

	return (x > y) - (x < y);
}

int main(int count, char **arguments)
{
	struct sockaddr_in at = { .sin_family = AF_INET };

	if (count < 3)
		errx(2, "usage: ping-pong serve PORT | ping-pong ADDRESS PORT ROUNDS");
	at.sin_port = htons(atoi(arguments[2]));
	if (!strcmp(arguments[1], "serve"))
		serve(at);

	int rounds = count > 3 ? atoi(arguments[3]) : 0, tcp = tcp_socket();
	long *times = rounds > 0 ? calloc(rounds, sizeof *times) : NULL;
	char byte = 0;

	if (!times || inet_pton(AF_INET, arguments[1], &at.sin_addr) != 1)
		errx(2, "an IPv4 address and a number of rounds, at least one, are needed");
	if (connect(tcp, (struct sockaddr *)&at, sizeof at))
		err(1, "connecting to %s", arguments[1]);
	no_delay(tcp);
	for (int round = -WARM_UP; round < rounds; round++) {
		long begin = nanoseconds();

		if (write(tcp, &byte, 1) != 1 || read(tcp, &byte, 1) != 1)
			err(1, "the other side is gone");
		if (round >= 0)
			times[round] = nanoseconds() - begin;
	}
	qsort(times, rounds, sizeof *times, by_size);
	printf("%.1f\n", times[rounds / 2] / 1e3);
	return 0;
}
