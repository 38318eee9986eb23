/* pool.h: the threads that kernels run on. */
#ifndef TQAI_POOL_H
#define TQAI_POOL_H

typedef void (*tqai_task)(void *context, int task);

/* Run task(context, i) for i in 0 .. tasks - 1 on at most `threads` threads, the caller among them, and
 * return when all are done. Where the threads are busy with another caller, the caller does it all. */
void tqai_parallel(int threads, int tasks, tqai_task task, void *context);

#endif
