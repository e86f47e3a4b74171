//! Limits the memory of parsed JSON. A value can take fifty times more memory than its two bytes
//! in an answer.

use crate::upstream::error::UpstreamError;

/// Values that one answer or event may have. They take about 64 MiB in memory.
const MAX_VALUES: usize = 500_000;
/// Values that an object counts for, because its first entry allocates space for eleven.
const PER_OBJECT: usize = 5;

/// Returns true if the JSON has too many values to parse.
pub(super) fn is_dense(json: &[u8]) -> bool {
    // A shorter text cannot have that many values, and most texts are shorter.
    json.len() > MAX_VALUES && values(json) > MAX_VALUES
}

/// Estimates the number of values: counts commas, lists and objects outside strings.
fn values(json: &[u8]) -> usize {
    let (mut values, mut in_text, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' | b'[' if !in_text => values += 1,
            b'{' if !in_text => values += PER_OBJECT,
            _ => {}
        }
    }
    values
}

/// The size of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Size {
    bytes: usize,
    values: usize,
}

impl Size {
    pub(super) fn of(json: &[u8]) -> Self {
        Self {
            bytes: json.len(),
            values: values(json),
        }
    }
}

/// The budget for content kept of several answers, such as the pages of a list. All of them
/// together get the limit of one answer.
#[derive(Debug)]
pub(super) struct SizeBudget {
    so_far: Size,
    max_bytes: usize,
}

impl SizeBudget {
    /// `max_bytes`: the limit of one answer.
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            so_far: Size::default(),
            max_bytes,
        }
    }

    /// Charges one more answer to the budget.
    ///
    /// # Errors
    ///
    /// [`UpstreamError::Protocol`] if the budget is exceeded.
    pub(super) fn add(&mut self, more: Size) -> Result<(), UpstreamError> {
        self.so_far.bytes = self.so_far.bytes.saturating_add(more.bytes);
        self.so_far.values = self.so_far.values.saturating_add(more.values);
        if self.so_far.bytes > self.max_bytes || self.so_far.values > MAX_VALUES {
            let text = format!(
                "the pages of a list have together more than {} bytes, or too many values",
                self.max_bytes
            );
            return Err(UpstreamError::Protocol(text));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_pass_and_long_lists_of_nothing_do_not() {
        assert!(!is_dense("0,".repeat(MAX_VALUES).as_bytes()));
        assert!(is_dense("[]".repeat(MAX_VALUES + 1).as_bytes()));
        assert!(is_dense(
            "{\"\":0}".repeat(MAX_VALUES / PER_OBJECT + 1).as_bytes()
        ));
        assert!(is_dense("0,".repeat(MAX_VALUES + 1).as_bytes()));
        let numbers = "0,".repeat(2 * MAX_VALUES);
        assert!(!is_dense(format!("{{\"text\": \"{numbers}\"}}").as_bytes()));
        assert!(!is_dense(format!("[\"\\\"{numbers}\\\\\"]").as_bytes()));
        assert!(is_dense(format!("[\"\\\\\", {numbers}0]").as_bytes()));
    }

    #[test]
    fn answers_have_together_what_one_may_have() {
        let size = |json: &str| Size::of(json.as_bytes());
        let mut kept = SizeBudget::new(20);
        kept.add(size("[1,2,3]")).unwrap();
        kept.add(size("[1,2,3,4,5]")).unwrap();
        assert!(matches!(kept.add(size("[]")), Ok(())));
        assert!(matches!(
            kept.add(size("1")),
            Err(UpstreamError::Protocol(_))
        ));
        let half = "0,".repeat(MAX_VALUES / 2);
        let mut kept = SizeBudget::new(usize::MAX);
        kept.add(size(&half)).unwrap();
        kept.add(size(&half)).unwrap();
        assert!(matches!(
            kept.add(size("0,")),
            Err(UpstreamError::Protocol(_))
        ));
    }
}
