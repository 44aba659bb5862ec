"""The way to the archive: proxies and trusted certificates, the same for queries and downloads."""

from __future__ import annotations

import functools
import logging
import os
import ssl
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from requests.certs import where as find_certifi_bundle
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

from spxdask.archive.urls import strip_credentials
from spxdask.errors import ConfigError

logger = logging.getLogger(__name__)
_MAKING_SSL_CONTEXT = threading.Lock()

# Variables that name a file of certificates, or a folder of them.
TRUST_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
# Where systems keep the certificates that they trust. A Python that was not built for the system
# looks for them elsewhere.
_SYSTEM_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def find_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL, by the rules of requests.

    Parameters
    ----------
    url : str
        Where a request is to go.

    Returns
    -------
    str or None
        The proxy's URL with its credentials, None for a direct connection.

    Raises
    ------
    ConfigError
        If the proxy has no host or no valid port.
    """
    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    shown = strip_credentials(named if "//" in named else f"//{named}").removeprefix("//")
    rule = "host:port or http://host:port"
    try:
        proxy = prepend_scheme_if_needed(named, "http")
        parts = urlsplit(proxy)
        if not parts.hostname or parts.port == 0:
            raise ValueError("it has no host")
    # LocationParseError of urllib3 is a ValueError.
    except ValueError as error:
        raise ConfigError(
            option="the proxy for " + _host_of(url), value=shown, rule=rule
        ) from error
    return proxy


def find_download_proxy(url: str) -> str | None:
    """Return the proxy for a download, which can use fewer kinds of proxies than a query.

    Parameters
    ----------
    url : str
        Where a request is to go.

    Returns
    -------
    str or None
        As of `find_proxy`.

    Raises
    ------
    ConfigError
        If the proxy is not spoken to by plain HTTP.
    """
    proxy = find_proxy(url)
    if proxy is not None and urlsplit(proxy).scheme.lower() != "http":
        raise ConfigError(
            f"frames of {_host_of(url)} cannot be fetched through the proxy "
            f"{strip_credentials(proxy)}, as only proxies of the form http://host:port are "
            "supported: set https_proxy (or http_proxy, all_proxy) to one, or name the host in "
            "no_proxy"
        )
    return proxy


def get_ssl_context() -> ssl.SSLContext:
    """Return the TLS settings of all requests to the archive.

    Trusted are the certificates that `TRUST_VARIABLES` name, those of certifi, and the system's.

    Returns
    -------
    ssl.SSLContext
        The same one while the environment is the same.
    """
    # Requests that are made at once would each read all certificates.
    with _MAKING_SSL_CONTEXT:
        return _make_ssl_context(tuple(_list_named_stores()))


def _list_named_stores() -> Iterator[tuple[str, str]]:
    """Yield each variable that is set, and each path that it names."""
    for variable in TRUST_VARIABLES:
        value = os.environ.get(variable, "")
        # OpenSSL takes a list of folders.
        paths = value.split(os.pathsep) if variable == "SSL_CERT_DIR" else [value]
        yield from ((variable, path) for path in paths if path)


@functools.lru_cache(maxsize=8)
def _make_ssl_context(named: tuple[tuple[str, str], ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    # Since Python 3.13, it refuses the certificates of many institutes' own authorities, which
    # requests accepts.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    # Variables often name the same file, and to read one takes 30 ms.
    loaded: set[str] = set()
    for variable, path in named:
        try:
            _load(context, path, loaded)
        except OSError as error:
            reason = error.strerror or str(error)
            logger.warning("%s names %s, which cannot be read (%s)", variable, path, reason)
    _load(context, find_certifi_bundle(), loaded)
    compiled_in = ssl.get_default_verify_paths()
    for path in (compiled_in.openssl_cafile, compiled_in.openssl_capath, *_SYSTEM_STORES):
        if os.path.exists(path):
            try:
                _load(context, path, loaded)
            except OSError as error:
                logger.debug("certificates in %s cannot be read: %s", path, error)
    return context


def _load(context: ssl.SSLContext, path: str, loaded: set[str]) -> None:
    """Trust the certificates of a file or folder, unless it has been loaded."""
    real = os.path.realpath(path)
    if real in loaded:
        return
    if os.path.isdir(real):
        context.load_verify_locations(capath=real)
    else:
        context.load_verify_locations(cafile=real)
    loaded.add(real)


def find_trusted_file() -> str | None:
    """Return the file or folder of certificates that the environment names first.

    For libraries that take no `get_ssl_context`, but the name of a file.

    Returns
    -------
    str or None
        None if none is named that exists.
    """
    return next((path for _, path in _list_named_stores() if os.path.exists(path)), None)


def explain_certificate_error(url: str, error: BaseException) -> str | None:
    """Return in a sentence why the certificate of a server is not accepted.

    Parameters
    ----------
    url : str
        What was asked for.
    error : BaseException
        What a library raised.

    Returns
    -------
    str or None
        None if neither the error nor one behind it is about a certificate.
    """
    cause = _find_certificate_error(error)
    if cause is None:
        return None
    reason = getattr(cause, "verify_message", "") or cause.strerror or str(cause)
    named = [f"{variable} ({path})" for variable, path in _list_named_stores()]
    trusted = ", ".join([*named, "certifi", "the system"])
    return (
        f"the certificate of {_host_of(url)} is not accepted: {reason[:1].lower()}{reason[1:]}; "
        f"trusted are the authorities of {trusted}: name the file of another in "
        "REQUESTS_CA_BUNDLE or SSL_CERT_FILE, where workers run, too"
    )


def _find_certificate_error(error: BaseException) -> ssl.SSLError | None:
    """Return the error about a certificate that is behind another one."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, ssl.SSLError) and (
            isinstance(one, ssl.SSLCertVerificationError) or "CERTIFICATE" in str(one).upper()
        ):
            return one
        # urllib3, aiohttp and botocore keep what happened in attributes and arguments.
        kept = ("reason", "cause", "os_error", "certificate_error", "_certificate_error")
        waiting += [one.__cause__, one.__context__, *one.args]
        waiting += [getattr(one, name, None) for name in kept]
    return None


def _host_of(url: str) -> str:
    """Return the host and port of a URL."""
    return strip_credentials(f"//{urlsplit(url).netloc}")[2:]
