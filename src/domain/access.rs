//! Who asks, and what they may do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{TenantKey, UserKey};

text_enum!(
    /// What a caller may do; each includes those before it.
    #[derive(Ord, PartialOrd)]
    Access {
        /// Read conversations of the tenant.
        Read = "read",
        /// Talk in them, and steer and delete them.
        Chat = "chat",
        /// See all threads of the tenant at once.
        Admin = "admin",
        /// Have the work in the background done, which is about all tenants.
        Operator = "operator",
    }
);

/// Who asks, as far as they have proved it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Principal {
    pub tenant: TenantKey,
    pub access: Access,
    /// The only user whose conversations are theirs; all of the tenant's without.
    pub user: Option<UserKey>,
    /// For logs and limits: no secret.
    pub name: String,
}

impl Principal {
    /// Whoever asks where nobody has to prove anything.
    pub fn anybody() -> Self {
        Self {
            tenant: TenantKey::default(),
            access: Access::Operator,
            user: None,
            name: "anybody".to_owned(),
        }
    }
}
