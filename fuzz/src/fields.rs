//! Input as lines of `name: value`, which a person, a fuzzer and a dictionary can all write. No value can hold a line feed, as
//! none can in HTTP.
//!
//! Names that no header can have stand for what else a proxy knows of a request; each target says which it reads.

/// The lines of an input, in their order. Lines without `: ` say nothing.
pub struct Fields<'a>(Vec<(String, &'a [u8])>);

impl<'a> Fields<'a> {
    /// Reads an input.
    pub fn parse(data: &'a [u8]) -> Self {
        let line = |line: &'a [u8]| {
            let colon = line.windows(2).position(|pair| pair == b": ")?;
            let name = std::str::from_utf8(&line[..colon]).ok()?.to_ascii_lowercase();
            Some((name, &line[colon + 2..]))
        };
        Fields(data.split(|byte| *byte == b'\n').filter_map(line).collect())
    }

    /// All names and values.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &'a [u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// The values under a name.
    pub fn all(&self, name: &str) -> Vec<&'a [u8]> {
        self.0.iter().filter(|(field, _)| field == name).map(|(_, value)| *value).collect()
    }

    /// The first value under a name.
    pub fn first(&self, name: &str) -> Option<&'a [u8]> {
        self.0.iter().find(|(field, _)| field == name).map(|(_, value)| *value)
    }

    /// The first value under a name as text, with what is no UTF-8 replaced.
    pub fn text(&self, name: &str) -> Option<String> {
        self.first(name).map(|value| String::from_utf8_lossy(value).into_owned())
    }
}
