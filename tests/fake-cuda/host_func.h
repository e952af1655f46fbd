/* cuLaunchHostFunc of the fake libcuda (part of libcuda.c): work on a stream that stands for kernels. It takes its time to
 * begin, and what nobody has ordered by an event comes in between. */

/* Whether it is done; else it has just been given the time at which it begins. */
static bool host_call(Op *op, uint64_t now) {
  if (op->kind != HOST) return true;
  if (!op->begun) {
    op->begun = true;
    op->due_ns = now + read_us * (1000 + chance(2001));
    return false;
  }
  pthread_mutex_unlock(&lock);
  op->call(op->argument);
  pthread_mutex_lock(&lock);
  return true;
}

CUresult cuLaunchHostFunc(void *stream, void (*call)(void *), void *argument) {
  ENTER_CONTEXT();
  REQUIRE(is_stream(stream), INVALID_HANDLE);
  REQUIRE(call, INVALID_VALUE);
  push(stream, (Op){.kind = HOST, .call = call, .argument = argument});
  LEAVE();
}
