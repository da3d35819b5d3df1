/*
 * tick ADDRESS NAME: the test guest's only program. Ten times a second it broadcasts a counter, its boot id and its own clock, and it
 * switches the machine off when somebody presses the power button (which is how servers ask a guest to stop).
 * Outside nobody can ask it anything: it is judged by the ticks that arrive. If it has a disk /dev/vda, each tick is written there
 * before it is heard: one a sector, after those that are there already.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 9999
#define BUTTONS 8
#define SECTOR 512

static int disk = -1;
static off_t written;

static double clock_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void read_boot_id(char *id, int size)
{
	FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
	if (file && fgets(id, size, file))
		id[strcspn(id, "\n")] = 0;
	if (file)
		fclose(file);
}

static int open_buttons(struct pollfd *buttons)
{
	int count = 0;
	for (int i = 0; i < BUTTONS; i++) {
		char path[32];
		snprintf(path, sizeof path, "/dev/input/event%d", i);
		int file = open(path, O_RDONLY | O_NONBLOCK);
		if (file >= 0)
			buttons[count++] = (struct pollfd){file, POLLIN, 0};
	}
	return count;
}

static void switch_off_if_asked(struct pollfd *buttons, int count)
{
	struct input_event event;
	for (int i = 0; i < count; i++)
		while (read(buttons[i].fd, &event, sizeof event) == sizeof event)
			if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
				sync();
				reboot(RB_POWER_OFF);
			}
}

static void open_disk(void)
{
	char sector[SECTOR];
	disk = open("/dev/vda", O_RDWR | O_DSYNC);
	while (disk >= 0 && pread(disk, sector, SECTOR, written) == SECTOR && !memcmp(sector, "TICK ", 5))
		written += SECTOR;
}

/* true if the tick is where it shall be, and may be heard */
static int keep(const char *line)
{
	char sector[SECTOR] = {0};
	if (disk < 0)
		return 1;
	snprintf(sector, SECTOR, "%s", line);
	if (pwrite(disk, sector, SECTOR, written) != SECTOR)
		return 0;
	written += SECTOR;
	return 1;
}

int main(int count, char **arguments)
{
	char boot[64] = "?";
	struct pollfd buttons[BUTTONS];
	int pressed = open_buttons(buttons), sock = socket(AF_INET, SOCK_DGRAM, 0), yes = 1;
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	if (count < 3)
		return 2;
	inet_pton(AF_INET, arguments[1], &to.sin_addr);
	setsockopt(sock, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes);
	read_boot_id(boot, sizeof boot);
	open_disk();
	double next = clock_now();
	for (unsigned long n = 1;; n++) {
		char line[200];
		int length = snprintf(line, sizeof line, "TICK %s %lu %s %.3f\n", arguments[2], n, boot, clock_now());
		if (keep(line))
			sendto(sock, line, (size_t)length, 0, (void *)&to, sizeof to);
		if (n % 10 == 0)
			dprintf(1, "%s", line);
		next += 0.1;
		do { /* also where a tick takes longer than its time: such a guest is still to be stopped */
			double left = next - clock_now();
			if (poll(buttons, (nfds_t)pressed, left > 0 ? (int)(left * 1000) + 1 : 0) > 0)
				switch_off_if_asked(buttons, pressed);
		} while (clock_now() < next);
		if (clock_now() > next + 0.1)
			next = clock_now(); /* time lost is not made up for */
	}
}
