// graphile-worker as its chapter on performance tunes it: a local queue of 500, completions in batches.
// The drain ends when no job is left in the table.

import { makeWorkerUtils, run as start, Logger } from "graphile-worker";
import { CALLERS, callers, counter, fill, pace, rate, ready, run, watch } from "./common.js";

const TASK = "shop.orders.create";
const logger = new Logger(() => () => {});

const utils = (connectionString) => makeWorkerUtils({ connectionString, logger, maxPoolSize: CALLERS });

const runner = (connectionString, handler, worker) =>
  start({
    taskList: { [TASK]: handler },
    noHandleSignals: true,
    preset: { worker: { connectionString, logger, concurrentJobs: 10, maxPoolSize: 12, ...worker } },
  });

await run({
  async drain(url, count) {
    const { addJobs, migrate, withPgClient } = await utils(url);
    await migrate();
    await fill(count, (jobs) => addJobs(jobs.map((job) => ({ identifier: TASK, payload: job }))));
    const query = (text) => withPgClient((client) => client.query(text));
    await query("ANALYZE");
    const { call, all } = counter(count);
    return rate(count, async () => {
      const tuned = { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 };
      const { stop } = await runner(url, call, tuned);
      await all;
      await stop();
      const { rows } = await query("SELECT count(*)::int AS left FROM graphile_worker._private_jobs");
      if (rows[0].left !== 0) throw new Error(`${rows[0].left} jobs are left`);
    });
  },
  async publish(url, count) {
    const { addJob, migrate } = await utils(url);
    await migrate();
    return callers(count, (job) => addJob(TASK, job));
  },
  async pace(url, count) {
    const { addJob, migrate } = await utils(url);
    await migrate();
    await pace(count, (job) => addJob(TASK, job));
  },
  async work(url, count) {
    const { handled, all } = watch(count);
    // Its quickest for single jobs: no local queue, which would hold completions back.
    await runner(url, handled, {});
    ready();
    return all;
  },
});
