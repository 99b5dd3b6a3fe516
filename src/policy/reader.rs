//! A typed walk over JSON that knows where it is, so that every complaint names its place and the fix. What the
//! fields mean must not live here.

use std::time::Duration;

use serde_json::{Map, Value};

use super::duration;

/// Why a policy is refused. Displays as one line: the place, what is wrong there, and the fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    path: String,
    problem: String,
}

impl PolicyError {
    pub(super) fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        PolicyError { path: path.into(), problem: problem.into() }
    }
}

impl std::fmt::Display for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.problem)
    }
}

impl std::error::Error for PolicyError {}

/// Text from the policy, fit to stand in one line.
pub(super) fn quote(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST).and_then(|(at, _)| text.get(..at)) {
        Some(start) => format!("{start:?} (and {} bytes more)", text.len() - start.len()),
        None => format!("{text:?}"),
    }
}

/// `; did you mean …?` where one of the words is near, else what `otherwise` says.
pub(super) fn hint<'w>(
    found: &str,
    words: impl IntoIterator<Item = &'w str>,
    otherwise: impl FnOnce() -> String,
) -> String {
    let near = |word: &&str| strsim::damerau_levenshtein(found, word) <= (word.chars().count() / 3).max(1);
    // What is longer than any word has no near one, and need not be measured.
    let nearest = (found.len() <= 64)
        .then(|| words.into_iter().filter(near).min_by_key(|word| strsim::damerau_levenshtein(found, word)))
        .flatten();
    match nearest {
        Some(word) => format!("; did you mean {}?", quote(word)),
        None => otherwise(),
    }
}

/// `a, b or c`.
pub(super) fn list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [rest @ .., last] => format!("{} or {last}", rest.join(", ")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    path: String,
    value: &'a Value,
}

impl<'a> Reader<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Reader { path: String::new(), value }
    }

    /// The place of a field in this value.
    pub(super) fn path_of(&self, field: &str) -> String {
        // A name with other characters is quoted, lest it break the line or look like a longer path.
        let plain =
            !field.is_empty() && field.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
        let name = if plain { field.to_owned() } else { quote(field) };
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> PolicyError {
        PolicyError::new(self.path.clone(), problem)
    }

    fn wrong_type(&self, fix: &str) -> PolicyError {
        let what = if self.path.is_empty() { "the policy is " } else { "is " };
        let fix = if self.value.is_null() { format!("{fix}, or leave the field out") } else { fix.to_owned() };
        self.error(format!("{what}{}; write {fix}", kind(self.value)))
    }

    fn map(&self) -> Result<&'a Map<String, Value>, PolicyError> {
        self.value.as_object().ok_or_else(|| self.wrong_type("an object"))
    }

    /// An object that has no other than these fields.
    pub(super) fn object(&self, known: &[&str]) -> Result<Object<'a>, PolicyError> {
        let fields = self.map()?;
        if let Some(unknown) = fields.keys().find(|key| !known.contains(&key.as_str())) {
            let otherwise = || {
                if known.is_empty() {
                    "; leave it out".into()
                } else {
                    format!("; the fields here are {}", known.join(", "))
                }
            };
            let hint = hint(unknown, known.iter().copied(), otherwise);
            return Err(PolicyError::new(self.path_of(unknown), format!("there is no such field{hint}")));
        }
        Ok(Object { at: self.clone(), fields })
    }

    /// An object with any fields.
    pub(super) fn entries(&self) -> Result<Vec<(&'a str, Reader<'a>)>, PolicyError> {
        let entry = |(key, value): (&'a String, &'a Value)| (key.as_str(), Reader { path: self.path_of(key), value });
        Ok(self.map()?.iter().map(entry).collect())
    }

    pub(super) fn items(&self) -> Result<Vec<Reader<'a>>, PolicyError> {
        let items = self.value.as_array().ok_or_else(|| self.wrong_type("a list"))?;
        let item = |(index, value)| Reader { path: format!("{}[{index}]", self.path), value };
        Ok(items.iter().enumerate().map(item).collect())
    }

    pub(super) fn text(&self) -> Result<&'a str, PolicyError> {
        self.text_like("a string")
    }

    /// A text of a kind: `fix` says what to write where it is none.
    pub(super) fn text_like(&self, fix: &str) -> Result<&'a str, PolicyError> {
        self.value.as_str().ok_or_else(|| self.wrong_type(fix))
    }

    pub(super) fn is_object(&self) -> bool {
        self.value.is_object()
    }

    pub(super) fn is_false(&self) -> bool {
        self.value == &Value::Bool(false)
    }

    pub(super) fn is_null(&self) -> bool {
        self.value.is_null()
    }

    pub(super) fn flag(&self) -> Result<bool, PolicyError> {
        self.value.as_bool().ok_or_else(|| self.wrong_type("true or false"))
    }

    /// A whole number in this range. A protobuf Struct holds doubles only, so 16.0 is 16.
    pub(super) fn integer(&self, least: u32, most: u32) -> Result<u32, PolicyError> {
        let Value::Number(number) = self.value else {
            return Err(self.wrong_type("a whole number"));
        };
        let fits = |value: f64| value.fract() == 0.0 && value >= f64::from(least) && value <= f64::from(most);
        match number.as_f64() {
            // In range and whole, so nothing is lost.
            Some(value) if fits(value) => Ok(value as u32),
            _ => Err(self.error(format!("{number} is not a whole number from {least} to {most}"))),
        }
    }

    pub(super) fn duration(&self) -> Result<Duration, PolicyError> {
        let fix = "a duration with its unit, such as \"2s\" or \"250ms\"";
        let text = self.text_like(fix)?;
        duration::parse(text).map_err(|problem| self.error(format!("{} {problem}", quote(text))))
    }

    /// One of some words. `what` says what they are: `a mode`.
    pub(super) fn word<T: Copy>(&self, what: &str, words: &[(&str, T)]) -> Result<T, PolicyError> {
        let text = self.text()?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Ok(*value);
        }
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let hint = hint(text, names.iter().copied(), || format!("; use {}", list(&names)));
        Err(self.error(format!("{} is not {what}{hint}", quote(text))))
    }

    /// A name for people, logs and metrics: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter first.
    pub(super) fn identifier(&self) -> Result<&'a str, PolicyError> {
        let text = self.text()?;
        let fits = text.len() <= 64
            && text.starts_with(|first: char| first.is_ascii_alphabetic())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if fits {
            return Ok(text);
        }
        Err(self.error(format!("{} is no name; use 1 to 64 of A-Z a-z 0-9 . _ - with a letter first", quote(text))))
    }
}

/// An object whose fields are all known.
#[derive(Debug)]
pub(super) struct Object<'a> {
    at: Reader<'a>,
    fields: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(super) fn get(&self, field: &str) -> Option<Reader<'a>> {
        self.fields.get(field).map(|value| Reader { path: self.at.path_of(field), value })
    }

    pub(super) fn require(&self, field: &str) -> Result<Reader<'a>, PolicyError> {
        let missing = || PolicyError::new(self.at.path_of(field), "is missing; it has no default");
        self.get(field).ok_or_else(missing)
    }

    /// What `read` makes of the field, where it is there.
    pub(super) fn read<T>(
        &self,
        field: &str,
        read: impl FnOnce(Reader<'a>) -> Result<T, PolicyError>,
    ) -> Result<Option<T>, PolicyError> {
        self.get(field).map(read).transpose()
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> PolicyError {
        self.at.error(problem)
    }

    pub(super) fn error_at(&self, field: &str, problem: impl Into<String>) -> PolicyError {
        PolicyError::new(self.at.path_of(field), problem)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }
}
