/* spread.h: tasks over threads, so that a thread gets neighbouring tasks one after another. */
#ifndef TQAI_SPREAD_H
#define TQAI_SPREAD_H

#include "pool.h"

/* Run task(context, i) for i in 0 .. tasks + last - 1 on at most `threads` threads and return when all are done.
 * Each thread takes its share of the first `tasks` in ascending order, then what others have not begun. The
 * `last` ones begin when all of the first have begun, so that they may wait for those. */
void tqai_spread(int threads, int tasks, int last, tqai_task task, void *context);

#endif
