// pg-boss with batches of 500 that are fetched again at once while they are full, by two workers.

import { PgBoss } from "pg-boss";
import { CALLERS, callers, counter, fill, rate, run } from "./common.js";

const QUEUE = "shop.orders.create";

async function open(connectionString, max) {
  const boss = new PgBoss({ connectionString, max, schedule: false });
  boss.on("error", (error) => {
    throw error;
  });
  await boss.start();
  await boss.createQueue(QUEUE);
  return boss;
}

await run({
  async drain(url, count) {
    const boss = await open(url, 10);
    await fill(count, (jobs) => boss.insert(QUEUE, jobs.map((data) => ({ data }))));
    await boss.getDb().executeSql("ANALYZE");
    const options = { batchSize: 500, burstWhenBatchFull: true, localConcurrency: 2, pollingIntervalSeconds: 0.5 };
    const { call, all } = counter(count);
    return rate(count, async () => {
      await boss.work(QUEUE, options, async (jobs) => jobs.forEach(call));
      await all;
      await boss.offWork(QUEUE, { wait: true });
    });
  },
  async publish(url, count) {
    const boss = await open(url, CALLERS);
    return callers(count, (job) => boss.send(QUEUE, job));
  },
});
