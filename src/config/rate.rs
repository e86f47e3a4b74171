//! Rates: a number of requests in a second, a minute, an hour or a day.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

/// Largest number in a rate: enough for any process.
const LARGEST: u32 = 1_000_000;
/// Name of a rate in errors about its type.
pub(super) const A_RATE: &str = "a rate";

/// A number of requests in a unit of time, and a number at once: `10/m`, `20/s burst 100`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rate {
    count: NonZeroU32,
    unit: Unit,
    burst: NonZeroU32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Unit {
    Second,
    Minute,
    Hour,
    Day,
}

/// Why a text is not a rate. Contains nothing of the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidRate {
    #[error("expected {A_RATE}")]
    Shape,
    #[error("{A_RATE} must begin with a whole number")]
    Count,
    #[error("{A_RATE} of 0 lets nothing through: leave the setting out to limit nothing")]
    Zero,
    #[error("the unit of {A_RATE} must be s, m, h or d")]
    Unit,
    #[error("the burst of {A_RATE} must be a whole number, 1 or more")]
    Burst,
    #[error("a number of {A_RATE} must be at most {LARGEST}")]
    TooLarge,
}

impl Rate {
    /// Returns the time after which one more request is allowed.
    pub fn period(&self) -> Duration {
        let unit = match self.unit {
            Unit::Second => Duration::from_secs(1),
            Unit::Minute => Duration::from_mins(1),
            Unit::Hour => Duration::from_hours(1),
            Unit::Day => Duration::from_hours(24),
        };
        unit / self.count.get()
    }

    /// Returns the number of requests that are allowed at once after a pause: the written burst, or else the
    /// number of a unit of time.
    pub fn burst(&self) -> NonZeroU32 {
        self.burst
    }
}

impl fmt::Display for Rate {
    /// Writes the rate in words, without the burst: `10 a minute`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Second => "a second",
            Unit::Minute => "a minute",
            Unit::Hour => "an hour",
            Unit::Day => "a day",
        };
        write!(f, "{} {unit}", self.count)
    }
}

impl FromStr for Rate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        let (count, rest) = text.split_once('/').ok_or(InvalidRate::Shape)?;
        let mut words = rest.split_whitespace();
        let unit = match words.next() {
            Some("s") => Unit::Second,
            Some("m") => Unit::Minute,
            Some("h") => Unit::Hour,
            Some("d") => Unit::Day,
            _ => return Err(InvalidRate::Unit),
        };
        let count = number(count.trim(), InvalidRate::Count, InvalidRate::Zero)?;
        let burst = match (words.next(), words.next(), words.next()) {
            (None, None, None) => count,
            (Some("burst"), Some(burst), None) => {
                number(burst, InvalidRate::Burst, InvalidRate::Burst)?
            }
            _ => return Err(InvalidRate::Shape),
        };
        Ok(Self { count, unit, burst })
    }
}

fn number(text: &str, none: InvalidRate, zero: InvalidRate) -> Result<NonZeroU32, InvalidRate> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(none);
    }
    let number = text
        .parse()
        .ok()
        .filter(|number| *number <= LARGEST)
        .ok_or(InvalidRate::TooLarge)?;
    NonZeroU32::new(number).ok_or(zero)
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Rate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(A_RATE)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Rate, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_told_in_words() {
        for (text, words, period, burst) in [
            ("10/m", "10 a minute", Duration::from_secs(6), 10),
            (
                "20/s burst 100",
                "20 a second",
                Duration::from_millis(50),
                100,
            ),
            (" 3 / h  burst  1 ", "3 an hour", Duration::from_mins(20), 1),
            (
                "1000000/d",
                "1000000 a day",
                Duration::from_micros(86_400),
                1_000_000,
            ),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(
                (rate.to_string(), rate.period(), rate.burst().get()),
                (words.to_owned(), period, burst)
            );
        }
    }

    #[test]
    fn what_is_no_rate_is_told_why() {
        use InvalidRate::{Burst, Count, Shape, TooLarge, Unit, Zero};
        for (why, texts) in [
            (
                Shape,
                &[
                    "",
                    "10",
                    "ten a minute",
                    "10/m burst",
                    "10/m 20",
                    "10/m burst 20 x",
                    "10/m Burst 20",
                ][..],
            ),
            (Count, &["/m", "0.5/s", "-1/m", "+1/m", "1_0/m", "ten/m"]),
            (Zero, &["0/m", "00/s burst 5"]),
            (Unit, &["10/", "10/fortnight", "10/M", "10/minute", "1/2/m"]),
            (Burst, &["10/m burst 0", "10/m burst x", "10/m burst 1.5"]),
            (
                TooLarge,
                &["1000001/s", "99999999999/s", "1/d burst 1000001"],
            ),
        ] {
            for text in texts {
                assert_eq!(text.parse::<Rate>(), Err(why), "{text}");
            }
        }
    }
}
