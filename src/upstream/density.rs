//! A limit on the number of values in JSON: in memory one may take fifty times the two bytes that it takes in an answer.

/// Values that one answer or event may have. In memory they take some 64 MiB.
const MAX_VALUES: usize = 500_000;

/// The JSON has too many values to be read: it has as many commas, but for those in texts.
pub(super) fn is_dense(json: &[u8]) -> bool {
    // What is shorter cannot have so many, and most is.
    if json.len() <= MAX_VALUES {
        return false;
    }
    let (mut commas, mut in_text, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' if !in_text => commas += 1,
            _ => {}
        }
    }
    commas > MAX_VALUES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_pass_and_long_lists_of_nothing_do_not() {
        assert!(!is_dense("0,".repeat(MAX_VALUES).as_bytes()));
        assert!(is_dense("0,".repeat(MAX_VALUES + 1).as_bytes()));
        let numbers = "0,".repeat(2 * MAX_VALUES);
        assert!(!is_dense(format!("{{\"text\": \"{numbers}\"}}").as_bytes()));
        assert!(!is_dense(format!("[\"\\\"{numbers}\\\\\"]").as_bytes()));
        assert!(is_dense(format!("[\"\\\\\", {numbers}0]").as_bytes()));
    }
}
