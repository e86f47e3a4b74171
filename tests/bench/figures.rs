//! Figures of a report.

use std::time::Duration;

/// Durations in ascending order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durations(Vec<Duration>);

impl FromIterator<Duration> for Durations {
    fn from_iter<I: IntoIterator<Item = Duration>>(durations: I) -> Self {
        let mut all: Vec<_> = durations.into_iter().collect();
        all.sort();
        Self(all)
    }
}

impl Durations {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the duration that `part` of a thousand did not exceed.
    pub(crate) fn permille(&self, part: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0.get(last * part / 1000).copied().unwrap_or_default()
    }

    pub(crate) fn p50(&self) -> Duration {
        self.permille(500)
    }

    pub(crate) fn p99(&self) -> Duration {
        self.permille(990)
    }
}

pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Returns the median of one figure over all rounds.
pub(crate) fn median_of<T>(rounds: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    median(rounds.iter().map(figure).collect())
}

#[expect(clippy::cast_precision_loss, reason = "nobody counts that far")]
pub(crate) fn count(number: usize) -> f64 {
    number as f64
}

/// The same for a count of the database.
#[expect(clippy::cast_precision_loss, reason = "nobody counts that far")]
pub(crate) fn number(number: i64) -> f64 {
    number as f64
}

pub(crate) fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
