/* cuLaunchHostFunc of the fake libcuda (part of libcuda.c): work on a stream that stands for kernels. It takes its time to
 * begin, and while it runs the copies of other streams go on: what nobody has ordered by an event happens under it. */

static void *host_run(void *raw) {
  Op *op = raw;
  op->call(op->argument);
  pthread_mutex_lock(&lock);
  op->call = NULL; /* done */
  op->due_ns = 0;
  pthread_cond_signal(&work);
  pthread_mutex_unlock(&lock);
  return NULL;
}

/* Whether it is done; else it begins, or has been given the time at which it does. */
static bool host_call(Op *op, uint64_t now) {
  if (op->kind != HOST || !op->call) return true;
  pthread_t thread;
  if (!op->begun) {
    op->begun = true;
    op->due_ns = now + read_us * (1000 + chance(2001));
  } else if (!op->running) {
    op->running = true;
    op->due_ns = UINT64_MAX;
    if (pthread_create(&thread, NULL, host_run, op) == 0) pthread_detach(thread);
    else broken = DEVICE_UNAVAILABLE;
  }
  return false;
}

CUresult cuLaunchHostFunc(void *stream, void (*call)(void *), void *argument) {
  ENTER_CONTEXT();
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(call, INVALID_VALUE);
  push(stream, (Op){.kind = HOST, .call = call, .argument = argument});
  LEAVE();
}
