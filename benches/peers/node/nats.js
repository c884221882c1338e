// nats.js on a JetStream stream in files: a pull consumer that acknowledges each message.

import { AckPolicy, connect, JSONCodec, StorageType } from "nats";
import { pace, ready, run, watch } from "./common.js";

const STREAM = "orders";
const SUBJECT = "shop.orders.create";
const codec = JSONCodec();


await run({
  async pace(url, count) {
    const jetstream = (await connect({ servers: url })).jetstream();
    await pace(count, (job) => jetstream.publish(SUBJECT, codec.encode(job)));
  },
  async work(url, count) {
    const connection = await connect({ servers: url });
    const manager = await connection.jetstreamManager();
    // What an earlier run left, if there was one.
    await manager.streams.delete(STREAM).catch(() => {});
    await manager.streams.add({ name: STREAM, subjects: [SUBJECT], storage: StorageType.File });
    await manager.consumers.add(STREAM, { durable_name: "worker", ack_policy: AckPolicy.Explicit });
    const { handled, all } = watch(count);
    const consumer = await connection.jetstream().consumers.get(STREAM, "worker");
    const callback = (message) => {
      handled(codec.decode(message.data));
      message.ack();
    };
    await consumer.consume({ callback });
    ready();
    return all;
  },
});
