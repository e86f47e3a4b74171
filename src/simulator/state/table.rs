//! Tables with a bounded number of rows.

use std::collections::{HashMap, VecDeque};

/// Rows by id, in order of creation. Beyond the limit the oldest idle ones are removed.
#[derive(Debug)]
pub(in crate::simulator) struct Table<T> {
    rows: HashMap<String, T>,
    order: VecDeque<String>,
    cap: usize,
}

/// A row that may be in use.
pub(in crate::simulator) trait Row {
    /// Returns true if the row must not be removed.
    fn is_busy(&self) -> bool;
}

impl<T: Row> Table<T> {
    pub(in crate::simulator) fn new(cap: usize) -> Self {
        Self {
            rows: HashMap::new(),
            order: VecDeque::new(),
            cap: cap.max(1),
        }
    }

    pub(in crate::simulator) fn get(&self, id: &str) -> Option<&T> {
        self.rows.get(id)
    }

    pub(in crate::simulator) fn get_mut(&mut self, id: &str) -> Option<&mut T> {
        self.rows.get_mut(id)
    }

    pub(in crate::simulator) fn remove(&mut self, id: &str) -> Option<T> {
        let row = self.rows.remove(id);
        if self.order.len() > 2 * self.rows.len() + 64 {
            self.order.retain(|id| self.rows.contains_key(id));
        }
        row
    }

    /// Returns ids and rows, oldest first.
    pub(in crate::simulator) fn iter(&self) -> impl Iterator<Item = (&String, &T)> {
        self.order
            .iter()
            .filter_map(|id| self.rows.get_key_value(id))
    }

    pub(in crate::simulator) fn insert(&mut self, id: String, row: T) {
        self.order.push_back(id.clone());
        self.rows.insert(id, row);
        // Busy rows move to the new end. The bound limits the search in a table of busy rows.
        for _ in 0..8 {
            if self.rows.len() <= self.cap {
                break;
            }
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            match self.rows.get(&oldest) {
                Some(row) if row.is_busy() => self.order.push_back(oldest),
                Some(_) => {
                    self.rows.remove(&oldest);
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbered(bool);

    impl Row for Numbered {
        fn is_busy(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn a_full_table_forgets_the_oldest_idle_row() {
        let mut table = Table::new(2);
        table.insert("busy".to_owned(), Numbered(true));
        for id in ["a", "b", "c"] {
            table.insert(id.to_owned(), Numbered(false));
        }
        assert!(
            table.get("busy").is_some() && table.get("a").is_none() && table.get("c").is_some()
        );
        assert_eq!(table.iter().count(), 2);
    }
}
