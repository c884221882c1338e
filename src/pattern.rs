//! Globs over event types, one at a time and by the ten thousand.
//!
//! A [`Pattern`] is the parsed, validated text. A [`PatternSet`] answers "who matches this type?" for many patterns at
//! once and remembers the answer per type, so that a publish costs the same with one subscription or ten thousand.
//! No subscription is known here: the set maps patterns to whatever value its owner gives.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use foldhash::HashMap;
use globset::{GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};
use parking_lot::RwLock;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::event::EventType;

/// A glob over event types.
///
/// `*` alone matches every type. Otherwise `*` stands for one segment or a part of one, `**` as a whole segment for
/// any number of segments (none included), and `?`, `[a-z]`, `[!a-z]` and `{a,b}` work inside a segment. Without `**`
/// the number of segments must be equal. Matching is case-sensitive.
#[derive(Clone)]
pub struct Pattern {
    text: Arc<str>,
    matchers: Arc<[GlobMatcher]>,
}

/// The longest pattern, in bytes.
pub const MAX_PATTERN: usize = 255;

impl Pattern {
    /// Parses and validates `text`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `pattern`, with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self> {
        validate(text).map_err(|reason| Error::invalid("pattern", text, reason))?;
        let matchers = globs(text)
            .iter()
            .map(|glob| compile(glob).map(|glob| glob.compile_matcher()))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| Error::invalid("pattern", text, error.kind().to_string()))?;
        Ok(Self { text: text.into(), matchers: matchers.into() })
    }

    /// Whether an event of this type is meant.
    #[must_use]
    pub fn matches(&self, event_type: &EventType) -> bool {
        let path = as_path(event_type.as_str());
        self.matchers.iter().any(|matcher| matcher.is_match(&path))
    }

    /// The text as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Dots become the separator that globs know.
fn as_path(event_type: &str) -> String {
    event_type.replace('.', "/")
}

/// The globs that together mean `pattern`. A trailing `**` also stands for no segment at all, which one glob cannot say.
fn globs(pattern: &str) -> Vec<String> {
    if pattern == "*" {
        return vec!["**".to_owned()];
    }
    let path = as_path(&pattern.replace("[!", "[!/"));
    match path.strip_suffix("/**") {
        Some(stem) => vec![stem.to_owned(), path],
        None => vec![path],
    }
}

fn compile(glob: &str) -> std::result::Result<globset::Glob, globset::Error> {
    GlobBuilder::new(glob).literal_separator(true).backslash_escape(false).build()
}

fn validate(text: &str) -> std::result::Result<(), &'static str> {
    if text.is_empty() {
        return Err("pattern cannot be empty");
    }
    if text.len() > MAX_PATTERN {
        return Err("must be at most 255 bytes");
    }
    let (mut in_braces, mut in_class) = (false, false);
    let mut previous = '\0';
    for character in text.chars() {
        match character {
            '{' if in_braces || in_class => return Err("braces cannot be nested or stand inside [ ]"),
            '{' => in_braces = true,
            '}' if !in_braces || in_class => return Err("} without {"),
            '}' => in_braces = false,
            ',' if !in_braces => return Err("a comma stands only inside { }"),
            '[' if in_class => return Err("[ cannot be nested"),
            '[' => in_class = true,
            ']' if !in_class || previous == '[' || previous == '!' => return Err("] without an open, non-empty ["),
            ']' => in_class = false,
            '.' if in_braces || in_class => return Err("{ } and [ ] work inside one segment"),
            '!' if previous != '[' => return Err("! stands only at the start of [ ]"),
            '*' | '?' if in_class => return Err("wildcards cannot stand inside [ ]"),
            '.' | '!' | ',' | '*' | '?' | '_' | '-' => {}
            other if other.is_ascii_alphanumeric() => {}
            _ => return Err("may hold A-Z a-z 0-9 _ - . * ? [ ] { } , and ! only"),
        }
        previous = character;
    }
    if in_braces || in_class {
        return Err("an open { or [ is never closed");
    }
    if class_ranges_leave_the_alphabet(text) {
        return Err("a range in [ ] must stay within a-z, A-Z or 0-9");
    }
    for segment in text.split('.') {
        if segment.is_empty() {
            return Err("a segment cannot be empty");
        }
        if segment.contains("**") && segment != "**" {
            return Err("** must be a whole segment");
        }
    }
    Ok(())
}

/// Whether some `[x-y]` spans characters outside one of a-z, A-Z, 0-9, where it could match the separator.
fn class_ranges_leave_the_alphabet(text: &str) -> bool {
    text.split('[').skip(1).filter_map(|rest| rest.split(']').next()).any(|class| {
        let class: Vec<char> = class.trim_start_matches('!').chars().collect();
        class.windows(3).any(|window| match *window {
            [from, '-', to] => ![('a', 'z'), ('A', 'Z'), ('0', '9')]
                .iter()
                .any(|&(low, high)| (low..=high).contains(&from) && (low..=high).contains(&to) && from <= to),
            _ => false,
        })
    })
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", &*self.text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// How many types' answers a [`PatternSet`] remembers before it starts afresh.
const CACHED_TYPES: usize = 8_192;

/// How many patterns share one automaton. One for all would pass the regex engine's size limit at some thousands.
const SHARD: usize = 512;

/// Many patterns, each with a value, and a bounded memory of who matches which type.
///
/// The set is immutable: a change makes a new one, and with it an empty memory.
pub struct PatternSet<T> {
    shards: Vec<Shard>,
    values: Vec<T>,
    answers: RwLock<HashMap<EventType, Arc<[T]>>>,
}

struct Shard {
    globs: GlobSet,
    /// Which of `values` each glob of this shard belongs to.
    owners: Vec<usize>,
}

impl<T: Clone> PatternSet<T> {
    /// Builds the set. Values keep the order of `entries` in every answer.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the patterns together cannot be compiled.
    pub fn new<'a>(entries: impl IntoIterator<Item = (&'a Pattern, T)>) -> Result<Self> {
        let (mut values, mut all) = (Vec::new(), Vec::new());
        for (pattern, value) in entries {
            all.extend(globs(pattern.as_str()).into_iter().map(|glob| (glob, values.len())));
            values.push(value);
        }
        let shards = all.chunks(SHARD).map(Shard::new).collect::<Result<_>>()?;
        Ok(Self { shards, values, answers: RwLock::default() })
    }

    /// The values whose patterns match, each once, in the order of construction.
    pub fn matching(&self, event_type: &EventType) -> Arc<[T]> {
        let known = self.answers.read().get(event_type).cloned();
        known.unwrap_or_else(|| self.look_up(event_type))
    }

    fn look_up(&self, event_type: &EventType) -> Arc<[T]> {
        let path = as_path(event_type.as_str());
        let mut owners: Vec<usize> = self.shards.iter().flat_map(|shard| shard.owners_of(&path)).collect();
        owners.sort_unstable();
        owners.dedup();
        let answer: Arc<[T]> = owners.into_iter().filter_map(|owner| self.values.get(owner).cloned()).collect();
        let mut answers = self.answers.write();
        if answers.len() >= CACHED_TYPES {
            answers.clear();
        }
        answers.insert(event_type.clone(), Arc::clone(&answer));
        answer
    }
}

impl Shard {
    fn new(entries: &[(String, usize)]) -> Result<Self> {
        let mut builder = GlobSetBuilder::new();
        for (glob, _) in entries {
            builder.add(compile(glob).map_err(|error| Error::invalid("pattern", glob, error.kind().to_string()))?);
        }
        let globs = builder.build().map_err(|error| Error::invalid("patterns", "", error.to_string()))?;
        Ok(Self { globs, owners: entries.iter().map(|&(_, owner)| owner).collect() })
    }

    fn owners_of(&self, path: &str) -> Vec<usize> {
        self.globs.matches(path).into_iter().filter_map(|glob| self.owners.get(glob).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, event_type: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(&EventType::parse(event_type).unwrap())
    }

    /// BEHAVIOURS B1–B5, and the wildcards that DESIGN §3 adds.
    #[test]
    fn the_truth_table_of_patterns() {
        let rows = [
            ("*", "public.users.create", true),
            ("*", "anything", true),
            ("*", "a.b.c.d.e.f", true),
            ("public.users.create", "public.users.create", true),
            ("public.users.create", "public.users.update", false),
            ("public.users.*", "public.users.create", true),
            ("public.users.*", "public.users", false),
            ("public.users.*", "public.users.create.late", false),
            ("public.*.create", "public.users.create", true),
            ("public.*.create", "private.users.create", false),
            ("*.users.create", "public.users.create", true),
            ("*.*.create", "public.users.create", true),
            ("*.*.create", "users.create", false),
            ("public.*.*", "public.users.create", true),
            ("public.*", "public.users", true),
            ("public.*", "public.users.create", false),
            ("public.*", "public", false),
            ("*.*", "a.b", true),
            ("*.*", "a", false),
            ("*.*", "a.b.c", false),
            ("Public.users.create", "public.users.create", false),
            ("public.users.create", "PUBLIC.users.create", false),
            ("something", "something", true),
            ("**", "a", true),
            ("**", "a.b.c", true),
            ("public.**", "public.users.create", true),
            ("public.**", "public", true),
            ("public.**", "publicity", false),
            ("**.create", "public.users.create", true),
            ("**.create", "create", true),
            ("a.**.z", "a.z", true),
            ("a.**.z", "a.b.c.z", true),
            ("a.**.z", "a.b.c", false),
            ("public.user*.create", "public.users.create", true),
            ("public.user*.create", "public.user.create", true),
            ("public.user*.create", "public.user.s.create", false),
            ("shop.{orders,carts}.update", "shop.carts.update", true),
            ("shop.{orders,carts}.update", "shop.users.update", false),
            ("*.*.{create,update,delete}", "shop.users.delete", true),
            ("*.*.{create,update,delete}", "shop.users.read", false),
            ("shop.order?.create", "shop.orders.create", true),
            ("shop.order?.create", "shop.order.create", false),
            ("a?b", "a.b", false),
            ("t[0-9].x", "t7.x", true),
            ("t[0-9].x", "tx.x", false),
            ("a[!x]b", "a.b", false),
            ("a[!x]b", "ayb", true),
        ];
        for (pattern, event_type, expected) in rows {
            assert_eq!(matches(pattern, event_type), expected, "{pattern} on {event_type}");
        }
    }

    #[test]
    fn a_pattern_that_breaks_a_rule_is_refused_with_the_rule() {
        let rows = [
            ("", "pattern cannot be empty"),
            ("a..b", "segment cannot be empty"),
            (".a", "segment cannot be empty"),
            ("a.b**", "whole segment"),
            ("a{b", "never closed"),
            ("a}", "} without {"),
            ("{a,{b,c}}", "nested"),
            ("{a.b,c}", "inside one segment"),
            ("a[]b", "non-empty"),
            ("a[!]b", "non-empty"),
            ("a[+-9]", "may hold"),
            ("a[0-z]", "must stay within"),
            ("a b", "may hold"),
            ("a/b", "may hold"),
            ("a\\b", "may hold"),
            ("a,b", "only inside"),
            ("ü.*", "may hold"),
        ];
        for (text, rule) in rows {
            let error = Pattern::parse(text).unwrap_err().to_string();
            assert!(error.contains(rule), "{text:?}: {error}");
            assert!(error.starts_with("pattern: "), "{error}");
        }
        assert!(Pattern::parse(&"a".repeat(256)).is_err());
    }

    #[test]
    fn a_set_answers_as_its_patterns_do_one_by_one() {
        let texts = ["*", "public.**", "public.users.*", "*.*.create", "x.y", "**.create", "public.users.create"];
        let patterns: Vec<Pattern> = texts.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        let set = PatternSet::new(patterns.iter().zip(texts)).unwrap();
        for event_type in ["public.users.create", "x.y", "public", "a.b.create", "chat.message"] {
            let event_type = EventType::parse(event_type).unwrap();
            let single: Vec<&str> =
                patterns.iter().filter(|pattern| pattern.matches(&event_type)).map(Pattern::as_str).collect();
            for _ in 0..2 {
                assert_eq!(&*set.matching(&event_type), &single[..], "{event_type}");
            }
        }
    }

    #[test]
    fn ten_thousand_patterns_fit_in_one_set() {
        let patterns: Vec<Pattern> =
            (0..10_000).map(|n| Pattern::parse(&format!("shop.table{n}.*")).unwrap()).collect();
        let set = PatternSet::new(patterns.iter().zip(0..)).unwrap();
        assert_eq!(&*set.matching(&EventType::parse("shop.table9999.create").unwrap()), &[9999]);
        assert_eq!(&*set.matching(&EventType::parse("shop.other.create").unwrap()), &[0_i32; 0]);
    }

    #[test]
    fn the_memory_of_answers_is_bounded() {
        let pattern = Pattern::parse("*").unwrap();
        let set = PatternSet::new([(&pattern, ())]).unwrap();
        for n in 0..CACHED_TYPES + 10 {
            set.matching(&EventType::parse(&format!("t{n}")).unwrap());
        }
        assert!(set.answers.read().len() <= CACHED_TYPES);
    }
}
