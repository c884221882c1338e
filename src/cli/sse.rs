//! Server-sent events as the standard has them, from bytes in any pieces.
//!
//! Nothing is known of what the events mean. Comments are passed over; `retry` is too, since the command backs off by
//! itself.

/// One event of a stream. One without data only moves the place to come back to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SseEvent {
    /// The place, where it is told.
    pub(super) id: Option<String>,
    /// The name; empty for a message.
    pub(super) name: String,
    /// The data without its last line break.
    pub(super) data: Option<String>,
}

/// Reads a stream piece by piece.
#[derive(Debug, Default)]
pub(super) struct SseReader {
    /// A line that has not ended.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed after it ends no other line.
    after_return: bool,
    event: SseEvent,
}

impl SseReader {
    /// The events that end in this piece.
    pub(super) fn read(&mut self, piece: &[u8]) -> Vec<SseEvent> {
        let mut ended = Vec::new();
        for &byte in piece {
            let is_pair = std::mem::take(&mut self.after_return) && byte == b'\n';
            match byte {
                _ if is_pair => {}
                b'\n' | b'\r' => {
                    self.after_return = byte == b'\r';
                    let line = std::mem::take(&mut self.line);
                    ended.extend(self.take(&String::from_utf8_lossy(&line)));
                }
                _ => self.line.push(byte),
            }
        }
        ended
    }

    /// Takes in a line. An empty one ends an event.
    fn take(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return (event.data.is_some() || event.id.is_some()).then_some(event);
        }
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "id" if !value.contains('\0') => self.event.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.event.name),
            "data" => match &mut self.event.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.event.data = Some(value.to_owned()),
            },
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": hello\nretry: 1000\nid: 7\n\nid: 8\ndata: {\"a\":\ndata: 1}\n\n: keep-alive\n\n\
                          event: reset\r\nid: 9\r\ndata:x\r\n\r\ndata: größe\n\n";

    fn events(pieces: impl IntoIterator<Item = Vec<u8>>) -> Vec<SseEvent> {
        let mut reader = SseReader::default();
        pieces.into_iter().flat_map(|piece| reader.read(&piece)).collect()
    }

    #[test]
    fn a_stream_reads_the_same_in_any_pieces() {
        let event = |id: &str, name: &str, data: &str| SseEvent {
            id: (!id.is_empty()).then(|| id.to_owned()),
            name: name.to_owned(),
            data: (!data.is_empty()).then(|| data.to_owned()),
        };
        let expected =
            [event("7", "", ""), event("8", "", "{\"a\":\n1}"), event("9", "reset", "x"), event("", "", "größe")];
        assert_eq!(events([STREAM.as_bytes().to_vec()]), expected);
        assert_eq!(events(STREAM.bytes().map(|byte| vec![byte])), expected);
    }
}
