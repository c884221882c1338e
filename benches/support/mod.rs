//! Side-by-side measurement: two pieces of work in turn, the median of each and of their ratio.
//!
//! Single figures of a noisy machine mean little; ratios of two runs within the same minute mean something. Every
//! figure is work per second, so a ratio above 1 says that ours is faster than the other side.

use std::time::{Duration, Instant};

/// How many pairs are run; their median counts.
pub const PAIRS: usize = 5;

/// About 300 bytes of JSON, as an order would have.
pub fn payload() -> String {
    let note = "x".repeat(180);
    format!(
        r#"{{"order_id":"o-100017","customer":"c-1017","total_cents":4599,"currency":"EUR","note":"{note}","lines":3}}"#
    )
}

/// The middle of `values`.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value below which `share` of `values` lie.
pub fn quantile(mut values: Vec<Duration>, share: f64) -> Duration {
    values.sort();
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// Runs `ours` and `other` in turn after one warm-up each; both return work per second. Prints the medians and the
/// median ratio, and returns that.
pub fn compare(what: &str, goal: &str, mut ours: impl FnMut() -> f64, mut other: impl FnMut() -> f64) -> f64 {
    ours();
    other();
    let mut rows = Vec::new();
    for _ in 0..PAIRS {
        rows.push((ours(), other()));
    }
    let ratio = median(rows.iter().map(|(a, b)| a / b).collect());
    let (a, b) = (median(rows.iter().map(|row| row.0).collect()), median(rows.iter().map(|row| row.1).collect()));
    println!("{what:<72} ours {a:>10.0}/s  other {b:>10.0}/s  ratio {ratio:>6.2}  goal {goal}");
    ratio
}

/// How many a second `count` in the time since `began` are.
pub fn per_second(count: usize, began: Instant) -> f64 {
    count as f64 / began.elapsed().as_secs_f64()
}
