//! The database engines, and choosing one by a URL.

use super::StoreError;

/// A database engine that the gateway can use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Engine {
    Postgres,
    Sqlite,
}

impl Engine {
    /// Returns the engine that the URL's scheme names: `postgres:`, `postgresql:` or `sqlite:`.
    ///
    /// # Errors
    /// [`StoreError::Open`] for any other scheme. The text lists the accepted forms. It shows only
    /// the scheme of the URL, because the rest may hold a password.
    pub fn of(url: &str) -> Result<Self, StoreError> {
        let scheme = url.split_once(':').map(|(scheme, _)| scheme);
        match scheme.map(str::to_ascii_lowercase).as_deref() {
            Some("postgres" | "postgresql") => Ok(Self::Postgres),
            Some("sqlite") => Ok(Self::Sqlite),
            other => {
                let found = match other {
                    Some(scheme)
                        if scheme
                            .bytes()
                            .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) =>
                    {
                        format!("begins with `{scheme}:`")
                    }
                    _ => "has no scheme".to_owned(),
                };
                Err(StoreError::Open(format!(
                    "store.url {found}; it must be `postgres://user@host:port/database` or `sqlite:path/to/file.db`"
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_decides() {
        for (url, kind) in [
            ("postgres://u:p@host/db", Engine::Postgres),
            ("postgresql://host/db", Engine::Postgres),
            ("POSTGRES://host/db", Engine::Postgres),
            ("sqlite:data/threadkeeper.db", Engine::Sqlite),
            ("sqlite:///var/lib/threadkeeper.db", Engine::Sqlite),
        ] {
            assert_eq!(Engine::of(url).unwrap(), kind, "{url}");
        }
    }

    #[test]
    fn another_scheme_is_refused_without_showing_the_url() {
        for url in [
            "mysql://u:secret@host/db",
            "host/secret",
            "u secret@host:5432/db",
            "",
        ] {
            let text = Engine::of(url).unwrap_err().to_string();
            assert!(
                text.contains("sqlite:path") && text.contains("postgres://"),
                "{text}"
            );
            assert!(!text.contains("secret"), "{text}");
        }
    }
}
