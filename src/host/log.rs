//! What a guest logs during one attempt: the end of it kept with the attempt, all of it up to a limit in the log.
//!
//! Shared between the plugin's own `log` calls and what WASI guests write to stdout and stderr.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;

use crate::delivery::LogLine;
use crate::event::EventId;
use crate::handler::Call;
use parking_lot::Mutex;

/// Levels as guests number them.
pub(super) const INFO: u8 = 2;
/// See [`INFO`].
pub(super) const WARN: u8 = 3;

/// What a line costs besides its text, so that empty lines are bounded too.
const LINE: usize = 16;

/// A line without an end is cut here.
const MAX_LINE: usize = 8 << 10;

/// Where an instance logs to: the tail of the event that it is busy with, if any. A clone shares it.
#[derive(Clone, Default)]
pub(super) struct Log {
    tail: Arc<Mutex<Option<Box<Tail>>>>,
}

/// Whose log it is, for the host's own.
struct Owner {
    plugin: Arc<str>,
    event: EventId,
    subscription: Arc<str>,
    attempt: u32,
}

/// The log of one attempt.
pub(super) struct Tail {
    owner: Owner,
    limit: usize,
    lines: VecDeque<LogLine>,
    kept: usize,
    cut: usize,
    seen: usize,
    /// What was written to stdout and stderr since the last end of a line.
    open: [(u8, Vec<u8>); 2],
}

impl Log {
    /// From here on lines go to `tail`; gives back where they went before.
    pub(super) fn exchange(&self, tail: Option<Box<Tail>>) -> Option<Box<Tail>> {
        mem::replace(&mut *self.lock(), tail)
    }

    /// Adds a line.
    pub(super) fn add(&self, line: LogLine) {
        if let Some(tail) = &mut *self.lock() {
            tail.add(line);
        }
    }

    /// Adds what was written to the stream whose lines have this level; each full line becomes one.
    pub(super) fn write(&self, level: u8, bytes: &[u8]) {
        if let Some(tail) = &mut *self.lock() {
            tail.write(level, bytes);
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Option<Box<Tail>>> {
        self.tail.lock()
    }
}

impl Tail {
    /// An empty log of `call`, of which `limit` bytes are kept.
    pub(super) fn new(plugin: &Arc<str>, call: &Call, limit: usize) -> Self {
        let owner = Owner {
            plugin: Arc::clone(plugin),
            event: call.event.id.clone(),
            subscription: Arc::clone(&call.subscription),
            attempt: call.attempt,
        };
        let open = [(INFO, Vec::new()), (WARN, Vec::new())];
        Self { owner, limit, lines: VecDeque::new(), kept: 0, cut: 0, seen: 0, open }
    }

    fn add(&mut self, mut line: LogLine) {
        shorten(&mut line, self.limit);
        if disarm(&mut line) {
            shorten(&mut line, self.limit);
        }
        self.show(&line);
        self.kept = self.kept.saturating_add(size(&line));
        self.lines.push_back(line);
        while self.kept > self.limit
            && let Some(first) = self.lines.pop_front()
        {
            self.kept = self.kept.saturating_sub(size(&first));
            self.cut = self.cut.saturating_add(1);
        }
    }

    fn write(&mut self, level: u8, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let Some((_, open)) = self.open.iter_mut().find(|(stream, _)| *stream == level) else { return };
            open.extend_from_slice(piece);
            if piece.ends_with(b"\n") || open.len() >= MAX_LINE {
                let text = mem::take(open);
                self.add(plain(level, &text));
            }
        }
    }

    /// The end of the log, and a first line that says so where earlier ones were cut.
    pub(super) fn finish(&mut self) -> Vec<LogLine> {
        for (level, text) in mem::take(&mut self.open) {
            if !text.is_empty() {
                self.add(plain(level, &text));
            }
        }
        let mark = (self.cut > 0).then(|| LogLine {
            level: WARN,
            message: "earlier lines were cut".to_owned(),
            fields: vec![("cut_lines".to_owned(), self.cut.to_string())],
        });
        mark.into_iter().chain(mem::take(&mut self.lines)).collect()
    }

    /// Shows a line in the host's log, up to the same limit: a guest cannot flood it.
    fn show(&mut self, line: &LogLine) {
        let before = self.seen;
        self.seen = self.seen.saturating_add(size(line));
        let Owner { plugin, event, subscription, attempt } = &self.owner;
        if before > self.limit {
            return;
        }
        if self.seen > self.limit {
            tracing::warn!(%plugin, %event, %subscription, attempt, "guest log cut");
            return;
        }
        let text = &*line.message;
        let fields = (!line.fields.is_empty()).then(|| tracing::field::debug(&line.fields));
        match line.level {
            0 => tracing::trace!(%plugin, %event, %subscription, attempt, text, fields, "guest log"),
            1 => tracing::debug!(%plugin, %event, %subscription, attempt, text, fields, "guest log"),
            2 => tracing::info!(%plugin, %event, %subscription, attempt, text, fields, "guest log"),
            3 => tracing::warn!(%plugin, %event, %subscription, attempt, text, fields, "guest log"),
            _ => tracing::error!(%plugin, %event, %subscription, attempt, text, fields, "guest log"),
        }
    }
}

fn plain(level: u8, text: &[u8]) -> LogLine {
    LogLine { level, message: String::from_utf8_lossy(text).trim_end().to_owned(), fields: Vec::new() }
}

fn size(line: &LogLine) -> usize {
    let fields: usize = line.fields.iter().map(|(name, value)| name.len().saturating_add(value.len())).sum();
    line.message.len().saturating_add(fields).saturating_add(LINE)
}

/// Cuts a line that would not fit by itself: its fields go first, then the end of its text, with a mark.
fn shorten(line: &mut LogLine, limit: usize) {
    if size(line) <= limit {
        return;
    }
    line.fields.clear();
    cut(&mut line.message, limit.saturating_sub(LINE));
}

/// Writes out what would steer a terminal or reorder what is shown, and says whether there was any. Line ends and tabs
/// stay: they are quoted where one line is one entry.
fn disarm(line: &mut LogLine) -> bool {
    let fields = line.fields.iter_mut().flat_map(|(name, value)| [name, value]);
    let armed = std::iter::once(&mut line.message).chain(fields).filter(|text| text.chars().any(is_armed));
    armed.map(|text| *text = text.chars().flat_map(written_out).collect()).count() > 0
}

fn is_armed(c: char) -> bool {
    let reorders = matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    reorders || c.is_control() && !matches!(c, '\n' | '\t')
}

fn written_out(c: char) -> impl Iterator<Item = char> {
    let escape = is_armed(c).then(|| c.escape_unicode());
    let itself = escape.is_none().then_some(c);
    escape.into_iter().flatten().chain(itself)
}

/// Cuts `text` to `limit` bytes or a little more, on a character boundary, with a mark where it was cut.
pub(super) fn cut(text: &mut String, limit: usize) {
    const MARK: char = '…';
    if text.len() > limit {
        text.truncate(text.floor_char_boundary(limit.saturating_sub(MARK.len_utf8())));
        text.push(MARK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::call;

    fn log(limit: usize) -> Log {
        let log = Log::default();
        assert!(log.exchange(Some(Box::new(Tail::new(&"faults".into(), &call("null"), limit)))).is_none());
        log
    }

    fn lines(log: &Log) -> Vec<LogLine> {
        log.exchange(None).unwrap().finish()
    }

    fn line(message: &str) -> LogLine {
        LogLine { level: INFO, message: message.to_owned(), fields: Vec::new() }
    }

    fn messages(log: &Log) -> Vec<String> {
        lines(log).into_iter().map(|line| line.message).collect()
    }

    #[test]
    fn a_log_within_its_limit_is_kept_whole() {
        let log = log(1000);
        log.add(line("a"));
        log.add(line("b"));
        assert_eq!(messages(&log), ["a", "b"]);
    }

    #[test]
    fn the_end_of_a_long_log_is_kept_and_the_cut_is_marked() {
        let log = log(4 * (LINE + 2));
        (10..30).for_each(|n| log.add(line(&n.to_string())));
        let lines = lines(&log);
        assert_eq!(lines[0].fields, [("cut_lines".to_owned(), "16".to_owned())]);
        assert_eq!(lines.iter().skip(1).map(|line| &*line.message).collect::<Vec<_>>(), ["26", "27", "28", "29"]);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_with_a_mark() {
        let log = log(100);
        log.add(LogLine { fields: vec![("big".to_owned(), "f".repeat(200))], ..line(&"é".repeat(200)) });
        let lines = lines(&log);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].message.ends_with("é…") && lines[0].message.len() <= 100 - LINE, "{lines:?}");
        assert!(lines[0].fields.is_empty());
    }

    #[test]
    fn streams_become_lines_with_a_level_each() {
        let log = log(1000);
        log.write(INFO, b"hel");
        log.write(WARN, b"careful\nopen");
        log.write(INFO, b"lo\n\nend");
        let lines: Vec<_> = lines(&log).into_iter().map(|line| (line.level, line.message)).collect();
        let expected = [(WARN, "careful"), (INFO, "hello"), (INFO, ""), (INFO, "end"), (WARN, "open")]
            .map(|(l, m)| (l, m.to_owned()));
        assert_eq!(lines, expected);
    }

    #[test]
    fn what_would_steer_a_terminal_is_written_out() {
        let (log, long) = (log(1000), log(1000));
        let fields = vec![("a\u{7}".to_owned(), "\u{202e}b".to_owned())];
        log.add(LogLine { fields, ..line("\u{1b}[2J\u{9b}2J\rover\tand\nout") });
        let lines = lines(&log);
        assert_eq!(lines[0].message, "\\u{1b}[2J\\u{9b}2J\\u{d}over\tand\nout");
        assert_eq!(lines[0].fields, [("a\\u{7}".to_owned(), "\\u{202e}b".to_owned())]);
        long.add(line(&"\u{1b}".repeat(900)));
        assert!(messages(&long)[0].len() <= 1000, "also where that makes it longer");
    }

    /// A place that the host's log is written to.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_hosts_log_shows_whose_lines_they_are_and_no_more_than_the_limit() {
        for json in [false, true] {
            let written = Written::default();
            let writer = written.clone();
            let lines = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
            let log = log(10 * (LINE + 16));
            let work = || (0..1000).for_each(|n| log.add(line(&format!("\u{1b}[2J\nline {n:03}"))));
            match json {
                false => tracing::subscriber::with_default(lines.finish(), work),
                true => tracing::subscriber::with_default(lines.json().finish(), work),
            }
            let shown = String::from_utf8(written.0.lock().clone()).unwrap();
            let shown: Vec<&str> = shown.lines().collect();
            assert!((8..=11).contains(&shown.len()), "{shown:#?}");
            let (last, first) = shown.split_last().unwrap();
            assert!(last.contains("guest log cut"), "{last}");
            for line in first {
                for part in ["faults", "tests", "attempt", "guest log", "line 00"] {
                    assert!(line.contains(part), "{part} in {line}");
                }
                assert!(!line.contains('\u{1b}'), "{line}");
            }
        }
    }

    #[test]
    fn a_line_without_an_end_does_not_grow_for_ever() {
        let log = log(1 << 20);
        (0..100).for_each(|_| log.write(INFO, &[b'x'; 1000]));
        assert!(lines(&log).iter().all(|line| line.message.len() < MAX_LINE + 1000));
    }
}
