//! Processes that end with the one that started them.

use std::process::{Child, Command};
use std::sync::mpsc;

/// The kernel sends the signal of a parent's death when the thread ends that made the child: that one must not end before
/// the process does.
pub(super) fn spawn_from_a_thread_that_stays(mut command: Command) -> Child {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        send.send(command.spawn()).unwrap();
        loop {
            std::thread::park();
        }
    });
    receive.recv().unwrap().expect("setpriv and the server must be installed: run `make setup`")
}
