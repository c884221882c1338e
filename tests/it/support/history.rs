//! A record of what publishers were told, and a check of what a server then shows against it.
//!
//! Knows HTTP only, so that it judges any provider and any number of processes over one store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use serde_json::Value;
use tokio::sync::Notify;

/// What publishers tried, and what they were told.
#[derive(Default)]
pub(crate) struct History {
    told: Mutex<Told>,
    news: Notify,
}

#[derive(Default)]
struct Told {
    attempted: BTreeSet<String>,
    acknowledged: BTreeMap<String, u64>,
}

impl History {
    /// Notes that an event of this id is about to be published.
    pub(crate) fn attempting(&self, id: &str) {
        self.told.lock().unwrap().attempted.insert(id.to_owned());
    }

    /// Notes that the server acknowledged the event with this seq.
    pub(crate) fn acknowledged(&self, id: &str, seq: u64) {
        self.told.lock().unwrap().acknowledged.insert(id.to_owned(), seq);
        self.news.notify_waiters();
    }

    /// Waits until that many events were acknowledged.
    pub(crate) async fn reaches(&self, count: usize) {
        loop {
            let news = self.news.notified();
            if self.count() >= count {
                return;
            }
            news.await;
        }
    }

    /// How many events were acknowledged.
    pub(crate) fn count(&self) -> usize {
        self.told.lock().unwrap().acknowledged.len()
    }

    /// What the log and the details break of the promises, in words; empty when they keep them all.
    ///
    /// Promises: an acknowledged event is there, with the seq that was told, and handled; what is there was published or
    /// caused by a handler; seqs are dense from 1; no delivery succeeded twice; times are in order.
    pub(crate) fn violations(&self, log: &[Value], details: &BTreeMap<String, Value>) -> Vec<String> {
        let told = self.told.lock().unwrap();
        let mut broken = Vec::new();
        let seqs: BTreeSet<u64> = log.iter().filter_map(|event| event["seq"].as_u64()).collect();
        if seqs.len() != log.len() {
            broken.push(format!("{} events share {} seqs", log.len(), seqs.len()));
        }
        if let Some(missing) = (1..=log.len() as u64).find(|seq| !seqs.contains(seq)) {
            broken.push(format!("seq {missing} is missing below {:?}", seqs.last()));
        }
        for (id, seq) in &told.acknowledged {
            match details.get(id) {
                None => broken.push(format!("{id} was acknowledged as {seq} and is gone")),
                Some(detail) if detail["seq"].as_u64() != Some(*seq) => {
                    broken.push(format!("{id} was acknowledged as {seq} and is {}", detail["seq"]));
                }
                Some(_) => {}
            }
        }
        for (id, detail) in details {
            if !told.attempted.contains(id) && detail["caused_by"].is_null() {
                broken.push(format!("{id} was never published"));
            }
            broken.extend(violations_of_event(id, detail));
        }
        broken
    }
}

fn violations_of_event(id: &str, detail: &Value) -> Vec<String> {
    let mut broken = Vec::new();
    if detail["status"] != "completed" {
        broken.push(format!("{id} is {}: {}", detail["status"], detail["error"]));
    }
    let (created, processed, completed) = (&detail["created_at"], &detail["processed_at"], &detail["completed_at"]);
    let times: Vec<jiff::Timestamp> =
        [created, processed, completed].iter().filter_map(|time| time.as_str()?.parse().ok()).collect();
    if !times.is_sorted() {
        broken.push(format!("{id} was created {created}, processed {processed}, completed {completed}"));
    }
    for delivery in detail["deliveries"].as_array().into_iter().flatten() {
        let attempts = delivery["attempts"].as_array().cloned().unwrap_or_default();
        let succeeded = attempts.iter().filter(|attempt| attempt["verdict"] == "ok").count();
        if succeeded != 1 {
            broken.push(format!("{id} succeeded {succeeded} times for {}: {attempts:?}", delivery["subscription"]));
        }
        let numbers: Vec<u64> = attempts.iter().filter_map(|attempt| attempt["number"].as_u64()).collect();
        if !numbers.iter().copied().eq(1..=attempts.len() as u64) {
            broken.push(format!("{id} has attempts {numbers:?} for {}", delivery["subscription"]));
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn detail(id: &str, seq: u64, verdicts: &[&str]) -> (String, Value) {
        let attempts: Vec<Value> =
            verdicts.iter().enumerate().map(|(n, verdict)| json!({"number": n + 1, "verdict": verdict})).collect();
        let value = json!({"id": id, "seq": seq, "status": "completed", "created_at": "2026-01-01T00:00:00Z",
            "processed_at": "2026-01-01T00:00:01Z", "completed_at": "2026-01-01T00:00:02Z",
            "deliveries": [{"subscription": "s", "attempts": attempts}]});
        (id.to_owned(), value)
    }

    fn check(details: &[(String, Value)]) -> Vec<String> {
        let history = History::default();
        for (n, id) in ["a", "b"].into_iter().enumerate() {
            history.attempting(id);
            history.acknowledged(id, n as u64 + 1);
        }
        let log: Vec<Value> = details.iter().map(|(_, value)| value.clone()).collect();
        history.violations(&log, &details.iter().cloned().collect())
    }

    /// A checker that finds nothing in anything would pass every test that uses it.
    #[test]
    fn the_checker_finds_what_is_broken() {
        let (a, b) = (detail("a", 1, &["ok"]), detail("b", 2, &["lost", "ok"]));
        assert_eq!(check(&[a.clone(), b.clone()]), [""; 0]);
        let rows = [
            (vec![a.clone()], "b was acknowledged as 2 and is gone"),
            (vec![a.clone(), detail("b", 3, &["ok"])], "seq 2 is missing"),
            (vec![a.clone(), detail("b", 1, &["ok"])], "share"),
            (vec![a.clone(), detail("b", 2, &["ok", "ok"])], "succeeded 2 times"),
            (vec![a.clone(), detail("b", 2, &["retry"])], "succeeded 0 times"),
            (vec![a, b, detail("c", 3, &["ok"])], "c was never published"),
        ];
        for (details, words) in rows {
            let broken = check(&details).join("\n");
            assert!(broken.contains(words), "{words} in {broken:?}");
        }
    }
}
