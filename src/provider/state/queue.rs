//! Seqs, smallest first, at next to no cost while they come in order.
//!
//! Entries are hints: whoever pops one looks whether it still stands. Nothing is ever removed from the middle.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::event::Seq;

#[derive(Default)]
pub(in crate::provider) struct Queue {
    /// Ascending.
    ordered: VecDeque<Seq>,
    /// What came after something greater.
    late: BinaryHeap<Reverse<Seq>>,
}

impl Queue {
    pub(in crate::provider) fn push(&mut self, seq: Seq) {
        match self.ordered.back() {
            Some(&last) if last > seq => self.late.push(Reverse(seq)),
            Some(&last) if last == seq => {}
            _ => self.ordered.push_back(seq),
        }
    }

    pub(in crate::provider) fn is_empty(&self) -> bool {
        self.ordered.is_empty() && self.late.is_empty()
    }

    pub(in crate::provider) fn pop(&mut self) -> Option<Seq> {
        match (self.ordered.front(), self.late.peek()) {
            (Some(&first), Some(&Reverse(late))) if late <= first => self.late.pop().map(|Reverse(seq)| seq),
            (None, Some(_)) => self.late.pop().map(|Reverse(seq)| seq),
            _ => self.ordered.pop_front(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_smallest_comes_first_whatever_the_order_of_coming(seqs in proptest::collection::vec(1u64..50, 0..60)) {
            let mut queue = Queue::default();
            seqs.iter().for_each(|&seq| queue.push(seq));
            let mut popped: Vec<Seq> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert!(popped.is_sorted());
            popped.dedup();
            let mut expected = seqs;
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(popped, expected);
        }
    }
}
