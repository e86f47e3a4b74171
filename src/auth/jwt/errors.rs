//! Why a token proves nothing, and why tokens cannot be verified at all.

/// Why a token proves nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwtRefusal {
    /// The token is not good, and will not be. The text says why in fixed words, for the caller to read: nothing of the
    /// token is in it.
    #[error("the token is refused: {0}")]
    Invalid(&'static str),
    /// The issuer's keys cannot be had at present: the token may be good.
    #[error("the keys to verify tokens with cannot be had at present")]
    Unavailable,
}

/// Why tokens cannot be verified with this configuration.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwtSetupError {
    #[error("auth.jwt: there is no key, or more than one source of keys")]
    Source,
    #[error("auth.jwt: {0} cannot be used with the secret; a secret is for HS256")]
    Secret(&'static str),
    #[error("auth.jwt: the public key is not one for {0}, or too short")]
    PublicKey(&'static str),
    #[error(
        "auth.jwt: this machine has no CA certificates, so the server of jwks_url cannot be verified; install the package \
         `ca-certificates`, or let SSL_CERT_FILE name a bundle of certificates in PEM form"
    )]
    NoRootCertificates,
    #[error("auth.jwt: the HTTP client cannot be built")]
    Client,
}
