// BullMQ with a worker that handles 100 jobs at once. A job counts as handled once its completion is stored.

import { Queue, Worker } from "bullmq";
import { counter, fill, pace, rate, ready, run, watch } from "./common.js";

const NAME = "orders";

function connection(url) {
  const { hostname, port } = new URL(url);
  return { host: hostname, port: Number(port), maxRetriesPerRequest: null };
}

const queue = (url) => new Queue(NAME, { connection: connection(url) });

await run({
  async drain(url, count) {
    const jobs = queue(url);
    await fill(count, (batch) => jobs.addBulk(batch.map((data) => ({ name: NAME, data }))));
    const { call, all } = counter(count);
    return rate(count, async () => {
      const worker = new Worker(NAME, async () => {}, { connection: connection(url), concurrency: 100 });
      worker.on("completed", call);
      await all;
    });
  },
  async pace(url, count) {
    const jobs = queue(url);
    await pace(count, (job) => jobs.add(NAME, job));
  },
  async work(url, count) {
    const { handled, all } = watch(count);
    const worker = new Worker(NAME, async (job) => handled(job.data), { connection: connection(url), concurrency: 10 });
    await worker.waitUntilReady();
    ready();
    return all;
  },
});
