/*
 * vsock-shim PROGRAM [ARGS...]: becomes incusd or lxd on a kernel that knows AF_VSOCK but has no vhost_vsock module.
 *
 * A seccomp filter, inherited by all that PROGRAM starts, hands two calls to a supervisor beside it:
 *   - bind() of an AF_VSOCK address with CID 2 (the host's) binds any CID instead: CID 2 needs a transport in the kernel;
 *   - ioctl() of the vhost family is answered like an idle vhost device that can be migrated.
 * Where CAP_SYS_RESOURCE is missing, raising RLIMIT_MEMLOCK succeeds without effect: both daemons insist on it before QEMU.
 * So guests see a vsock device on which nothing ever answers: virtual machines run and move, but have no agent inside.
 * The process keeps its number; the supervisor ends with the last process under the filter. For test labs only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* the vhost ioctls that carry something back */
#define GET_FEATURES 0x8008af00u
#define GET_BACKEND_FEATURES 0x8008af26u
#define SET_VRING_BASE 0x4008af12u
#define GET_VRING_BASE 0xc008af12u
/* notify-on-empty, dirty log (without it QEMU forbids migration), any layout, indirect, event index, version 1, seqpacket */
#define FEATURES ((1ull << 24) | (1ull << 26) | (1ull << 27) | (1ull << 28) | (1ull << 29) | (1ull << 32) | 2ull)

static int read_from(pid_t pid, uint64_t address, void *buffer, size_t size)
{
	struct iovec here = {buffer, size}, there = {(void *)address, size};
	return process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -1;
}

static int write_to(pid_t pid, uint64_t address, void *buffer, size_t size)
{
	struct iovec here = {buffer, size}, there = {(void *)address, size};
	return process_vm_writev(pid, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -1;
}

static pid_t process_of(pid_t thread)
{
	char path[64], line[128];
	int process = thread;
	snprintf(path, sizeof path, "/proc/%d/status", thread);
	FILE *file = fopen(path, "re");
	if (!file)
		return thread;
	while (fgets(line, sizeof line, file))
		if (sscanf(line, "Tgid: %d", &process) == 1)
			break;
	fclose(file);
	return process;
}

/* an idle device hands back the ring position that it was given */
#define RINGS 4096
static struct ring {
	pid_t process;
	uint32_t device, index, position;
} rings[RINGS];
static unsigned rings_used;

static struct ring *ring_of(pid_t process, uint32_t device, uint32_t index)
{
	unsigned known = rings_used < RINGS ? rings_used : RINGS;
	for (unsigned i = 0; i < known; i++)
		if (rings[i].process == process && rings[i].device == device && rings[i].index == index)
			return &rings[i];
	struct ring *ring = &rings[rings_used++ % RINGS];
	*ring = (struct ring){process, device, index, 0};
	return ring;
}

static int vhost(const struct seccomp_notif *call)
{
	uint32_t command = (uint32_t)call->data.args[1], state[2];
	uint64_t argument = call->data.args[2], features = command == GET_FEATURES ? FEATURES : 0;
	switch (command) {
	case GET_FEATURES:
	case GET_BACKEND_FEATURES:
		return write_to(call->pid, argument, &features, sizeof features) ? -EFAULT : 0;
	case SET_VRING_BASE:
	case GET_VRING_BASE:
		if (read_from(call->pid, argument, state, sizeof state))
			return -EFAULT;
		struct ring *ring = ring_of(process_of(call->pid), (uint32_t)call->data.args[0], state[0]);
		if (command == SET_VRING_BASE) {
			ring->position = state[1];
			return 0;
		}
		state[1] = ring->position;
		return write_to(call->pid, argument, state, sizeof state) ? -EFAULT : 0;
	default:
		return 0;
	}
}

/* true if the call was the host's vsock address, and is answered */
static int bind_as_any(const struct seccomp_notif *call, int *error)
{
	struct sockaddr_vm address;
	if (read_from(call->pid, call->data.args[1], &address, sizeof address) || address.svm_family != AF_VSOCK ||
	    address.svm_cid != VMADDR_CID_HOST)
		return 0;
	int process = (int)syscall(SYS_pidfd_open, process_of(call->pid), 0);
	int sock = process < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, process, (int)call->data.args[0], 0);
	address.svm_cid = VMADDR_CID_ANY;
	*error = sock < 0 || bind(sock, (void *)&address, sizeof address) ? -errno : 0;
	if (sock >= 0)
		close(sock);
	if (process >= 0)
		close(process);
	return 1;
}

static void supervise(int calls)
{
	for (;;) {
		struct pollfd ready = {calls, POLLIN, 0};
		if (poll(&ready, 1, -1) < 0 && errno == EINTR)
			continue;
		if (!(ready.revents & POLLIN))
			_exit(0); /* nobody is left */
		struct seccomp_notif call;
		struct seccomp_notif_resp answer;
		memset(&call, 0, sizeof call);
		memset(&answer, 0, sizeof answer);
		if (ioctl(calls, SECCOMP_IOCTL_NOTIF_RECV, &call))
			continue;
		answer.id = call.id;
		if (call.data.nr != SYS_bind)
			answer.error = vhost(&call);
		else if (!bind_as_any(&call, &answer.error))
			answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
		ioctl(calls, SECCOMP_IOCTL_NOTIF_SEND, &answer);
	}
}

/* a grandchild, so that nobody has to reap it; it waits for the filter's file on `from` */
static void start_supervisor(int from, int unused)
{
	pid_t child = fork();
	if (child != 0) {
		waitpid(child, 0, 0);
		return;
	}
	if (fork())
		_exit(0);
	setsid();
	close(unused);
	int null = open("/dev/null", O_RDWR);
	for (int i = 0; i < 3; i++)
		dup2(null, i);
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	int calls;
	if (recvmsg(from, &message, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&message))
		_exit(1);
	memcpy(&calls, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof calls);
	close(from);
	supervise(calls);
}

static int send_file(int to, int file)
{
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec data = {"x", 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &file, sizeof file);
	return sendmsg(to, &message, 0) == 1 ? 0 : -1;
}

static int install_filter(void)
{
	int no_memlock = prctl(PR_CAPBSET_READ, CAP_SYS_RESOURCE) != 1;
	struct sock_filter code[] = {
		/*  0 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		/*  1 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 17),
		/*  2 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		/*  3 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_bind, 7, 0),
		/*  4 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 3, 0),
		/*  5 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_setrlimit, 7, 0),
		/*  6 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prlimit64, 8, 0),
		/*  7 */ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		/* ioctl(file, command, ...): of the vhost family? */
		/*  8 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
		/*  9 */ BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
		/* 10 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xaf00, 9, 8),
		/* bind(socket, address, length): as long as a vsock address? */
		/* 11 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		/* 12 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, sizeof(struct sockaddr_vm), 7, 6),
		/* setrlimit(resource, ...) */
		/* 13 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		/* 14 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RLIMIT_MEMLOCK, 6, 4),
		/* prlimit64(process, resource, new, old), unless it only asks */
		/* 15 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
		/* 16 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, RLIMIT_MEMLOCK, 0, 2),
		/* 17 */ BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		/* 18 */ BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2),
		/* 19 */ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		/* 20 */ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		/* 21 */ BPF_STMT(BPF_RET | BPF_K, no_memlock ? SECCOMP_RET_ERRNO | 0 : SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			    SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &program);
}

int main(int count, char **arguments)
{
	int pair[2];
	if (count < 2) {
		fprintf(stderr, "usage: vsock-shim PROGRAM [ARGS...]\n");
		return 2;
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
		perror("vsock-shim: socketpair");
		return 1;
	}
	start_supervisor(pair[0], pair[1]);
	close(pair[0]);
	int calls = install_filter();
	if (calls < 0 || send_file(pair[1], calls)) {
		perror("vsock-shim: seccomp");
		return 1;
	}
	close(calls);
	close(pair[1]);
	execvp(arguments[1], arguments + 1);
	perror(arguments[1]);
	return 127;
}
