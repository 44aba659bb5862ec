"""The way to the archive: one choice of proxies and certificates for queries and downloads."""

from __future__ import annotations

import gzip
import logging
import socket
import ssl
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spxdask.archive.network import (
    TRUST_VARIABLES,
    explain_certificate_error,
    find_download_proxy,
    find_proxy,
    get_ssl_context,
)
from spxdask.archive.received import ReceivedFile
from spxdask.archive.retry import RetryPolicy
from spxdask.archive.tap import TapOptions, run_adql
from spxdask.archive.transfer import fetch_file
from spxdask.errors import ArchiveError, ConfigError, InputError

HASTY = RetryPolicy(max_retries=3, first_delay_s=0.001)
SIZE = 5000
BODY = b"x" * SIZE
VOTABLE = b"""<?xml version="1.0"?>
<VOTABLE version="1.4" xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE type="results">
<TABLE><FIELD name="uri" datatype="char" arraysize="*"/>
<DATA><TABLEDATA><TR><TD>x</TD></TR></TABLEDATA></DATA></TABLE></RESOURCE></VOTABLE>"""


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", *TRUST_VARIABLES):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def fetch(url, size=SIZE, stall_timeout_s=5.0, retry=HASTY):
    received = ReceivedFile(memoryview(bytearray(100_000)), expected_size=size)

    def check(received):
        received.check_size(received.size)
        return bytes(received.content)

    return fetch_file(url, received, check, retry=retry, stall_timeout_s=stall_timeout_s)


def query(url):
    return list(run_adql(f"{url}/TAP", "SELECT 1", TapOptions(retry=HASTY))["uri"])


class Handler(BaseHTTPRequestHandler):
    """Answers a query with a table and all else with a file, or as the script says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.log.append((self.command, self.path, dict(self.headers), body))
        plain = (200, {}, VOTABLE if "/TAP" in self.path else BODY)
        status, headers, answer = next(self.server.answers, plain)
        self.send_response(status)
        for name, value in ({"Content-Length": len(answer)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET  # noqa: N815

    def do_CONNECT(self):
        """Let the client talk to the server of the tunnel, whatever host it names."""
        self.server.log.append((self.command, self.path, dict(self.headers), b""))
        status, headers, _ = next(self.server.answers, (200, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if status == 200:
            with socket.create_connection(("127.0.0.1", self.server.tunnel_port)) as far:
                back = threading.Thread(target=pump, args=(far, self.connection))
                back.start()
                pump(self.connection, far)
                back.join()

    def log_message(self, *_):
        pass


def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing of clients that leave."""


@contextmanager
def serving(answers=(), *, context=None, tunnel_port=0):
    server = Server(("127.0.0.1", 0), Handler)
    server.answers, server.log, server.tunnel_port = iter(answers), [], tunnel_port
    if context is not None:
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    server.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Proxies

ARCHIVE = "http://archive.test:8080"


def environments():
    """Yield environments of a proxy, and whether it is for the archive."""
    for name in ("http_proxy", "all_proxy", "ALL_PROXY"):
        yield {name: "{proxy}"}, True
        yield {name: "{host}"}, True
        yield {name: "{proxy}", "no_proxy": "other.test"}, True
    yield {"http_proxy": "{proxy}", "no_proxy": "archive.test"}, False
    yield {"http_proxy": "{proxy}", "no_proxy": ".test"}, False
    yield {"http_proxy": "{proxy}", "no_proxy": "archive.test:8080"}, False
    yield {"http_proxy": "{proxy}", "no_proxy": "archive.test:80"}, True
    yield {"https_proxy": "{proxy}"}, False
    yield {"all_proxy": "{proxy}", "http_proxy": ""}, True
    yield {"http_proxy": "{proxy}", "NO_PROXY": "*"}, False


@pytest.mark.parametrize(("variables", "is_for_archive"), [*environments()], ids=repr)
def test_queries_and_downloads_take_the_proxy_of_requests(monkeypatch, variables, is_for_archive):
    with serving() as proxy:
        values = {"proxy": proxy.url, "host": proxy.url.removeprefix("http://")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(**values))
        expected = proxy.url if is_for_archive else None
        assert find_proxy(f"{ARCHIVE}/x") == find_download_proxy(f"{ARCHIVE}/x") == expected
        if is_for_archive:
            assert fetch(f"{ARCHIVE}/frame") == BODY
            assert query(ARCHIVE) == ["x"]
            asked = [(command, path) for command, path, *_ in proxy.log]
            assert asked == [("GET", f"{ARCHIVE}/frame"), ("POST", f"{ARCHIVE}/TAP/sync")]


@pytest.mark.parametrize(
    "no_proxy", ["127.0.0.0/8", "127.0.0.1", "10.0.0.0/8, 127.0.0.0/24", "127.0.0.1/32"]
)
def test_networks_without_a_proxy(monkeypatch, no_proxy):
    monkeypatch.setenv("all_proxy", "127.0.0.1:9")
    monkeypatch.setenv("no_proxy", no_proxy)
    with serving() as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        assert query(archive.url) == ["x"]


@pytest.mark.parametrize("login", ["me:secret", "me:p%40ss%2Fword", "me:"])
def test_logins_of_proxies(monkeypatch, login):
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", f"//{login}@"))
        fetch(f"{ARCHIVE}/frame")
        query(ARCHIVE)
        sent = {headers["Proxy-Authorization"] for *_, headers, _ in proxy.log}
        expected = requests.Request("GET", ARCHIVE, auth=tuple(
            map(requests.utils.unquote, login.split(":"))
        )).prepare().headers["Authorization"]  # fmt: skip
    assert sent == {expected}


def test_a_proxy_that_wants_a_login(monkeypatch):
    refusal = (407, {"Proxy-Authenticate": "Basic"}, b"")
    with serving([refusal] * 9) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:secret@"))
        for ask in (lambda: fetch(f"{ARCHIVE}/frame"), lambda: fetch("https://archive.test/x")):
            monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:secret@"))
            proxy.log.clear()
            with pytest.raises(ArchiveError, match="needs a valid login") as caught:
                ask()
            assert caught.value.blame == "access"
            assert proxy.url in caught.value.reason
            assert "secret" not in str(caught.value)
            assert len(proxy.log) == 1
        proxy.log.clear()
        with pytest.raises(ArchiveError, match="407") as caught:
            query(ARCHIVE)
        assert len(proxy.log) == 1
        with pytest.raises(ArchiveError, match="needs a valid login") as caught:
            query("https://archive.test")
        assert caught.value.blame == "access"
        assert len(proxy.log) == 2


@pytest.mark.parametrize("value", ["https://p:3128", "socks5://me:secret@p:1080", "socks5h://p"])
@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_proxies_that_downloads_cannot_use_are_a_sentence(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"http://host:port are supported: .*no_proxy") as caught:
        fetch(f"{ARCHIVE}/frame")
    assert "archive.test:8080" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["http://", "http://p:port", "http://p:99999", "p:0"])
def test_what_is_no_proxy_is_a_sentence(monkeypatch, value):
    monkeypatch.setenv("http_proxy", value)
    for ask in (lambda: fetch(f"{ARCHIVE}/frame"), lambda: query(ARCHIVE)):
        with pytest.raises(ConfigError, match=r"the proxy for archive\.test:8080 must be"):
            ask()


def test_a_redirect_to_a_host_without_a_proxy(monkeypatch):
    with serving() as archive, serving([(302, {"Location": f"{archive.url}/y"}, b"")]) as proxy:
        monkeypatch.setenv("all_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        assert fetch("http://localhost:8080/frame") == BODY
        assert [path for _, path, *_ in proxy.log] == ["http://localhost:8080/frame"]
        assert [path for _, path, *_ in archive.log] == ["/y"]


def test_an_address_that_is_none_is_not_tried_again():
    for url in ("http://127.0.0.1:99999/x", "http://[::1/x"):
        with pytest.raises((ArchiveError, ValueError)) as caught:
            fetch(url)
        if isinstance(caught.value, ArchiveError):
            assert (caught.value.blame, caught.value.attempts) == ("access", None)


# Certificates


def make_name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def sign(subject, key, issuer, issuer_key, *extensions, days=10):
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(make_name(subject))
        .issuer_name(make_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=20))
        .not_valid_after(now + timedelta(days=days))
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, is_critical)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """The file of an authority, and a function that makes contexts of servers that it vouches for.

    It has no key identifier, as those of many institutes.
    """
    folder = tmp_path_factory.mktemp("authority")
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = (x509.BasicConstraints(ca=True, path_length=None), True)
    certificate = sign("Our own authority", key, "Our own authority", key, constraints)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(certificate.public_bytes(pem))

    def make_context(address="127.0.0.1", days=10):
        server_key = ec.generate_private_key(ec.SECP256R1())
        names = (x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), False)
        server = sign("server", server_key, "Our own authority", key, names, days=days)
        path = folder / f"{address}{days}.pem"
        path.write_bytes(
            server_key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + server.public_bytes(pem)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    return folder / "ca.pem", make_context


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_every_variable_is_heeded_by_queries_and_downloads(monkeypatch, authority, variable):
    path, make_context = authority
    monkeypatch.setenv(variable, str(path))
    with serving(context=make_context()) as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        assert query(archive.url) == ["x"]


def test_a_folder_of_certificates_is_heeded(monkeypatch, authority, tmp_path):
    path, make_context = authority
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(path)
    # The name that OpenSSL looks for is the hash of the subject.
    found = subject_hash(path)
    (tmp_path / f"{found}.0").write_bytes(path.read_bytes())
    monkeypatch.setenv("SSL_CERT_DIR", f"/nowhere:{tmp_path}")
    with serving(context=make_context()) as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        assert query(archive.url) == ["x"]


def subject_hash(path):
    import subprocess

    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_through_a_proxy(monkeypatch, authority):
    path, make_context = authority
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with (
        serving(context=make_context()) as archive,
        serving(tunnel_port=archive.server_port) as proxy,
    ):
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:secret@"))
        assert fetch(f"{archive.url}/frame") == BODY
        assert query(archive.url) == ["x"]
        assert {command for command, *_ in proxy.log} == {"CONNECT"}
        assert all("Proxy-Authorization" in headers for *_, headers, _ in proxy.log)
        assert not any("Proxy-Authorization" in headers for *_, headers, _ in archive.log)


@pytest.mark.parametrize(
    ("trusted", "address", "days", "says"),
    [
        (False, "127.0.0.1", 10, "unable to get local issuer certificate"),
        (True, "127.0.0.2", 10, "not valid for '127.0.0.1'"),
        (True, "127.0.0.1", -1, "certificate has expired"),
    ],
)
def test_a_certificate_that_is_not_accepted_is_one_sentence(
    monkeypatch, authority, trusted, address, days, says
):
    path, make_context = authority
    if trusted:
        monkeypatch.setenv("CURL_CA_BUNDLE", str(path))
    with serving(context=make_context(address, days)) as archive:
        for ask in (lambda: fetch(f"{archive.url}/frame"), lambda: query(archive.url)):
            with pytest.raises(ArchiveError) as caught:
                ask()
            reason = caught.value.reason
            host = archive.url.removeprefix("https://")
            assert reason.startswith(f"the certificate of {host} is not accepted: ")
            assert says in reason
            assert "REQUESTS_CA_BUNDLE or SSL_CERT_FILE" in reason
            assert (f"CURL_CA_BUNDLE ({path})" in reason) == trusted
            # It was tried once.
            assert (caught.value.blame, caught.value.attempts) == ("access", None)
        assert archive.log == []


def test_a_bundle_that_is_not_there_is_a_warning(monkeypatch, caplog, tmp_path):
    for variable in TRUST_VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert get_ssl_context().verify_mode == ssl.CERT_REQUIRED
    for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        assert f"{variable} names {tmp_path / variable}, which cannot be read" in caplog.text


def test_other_errors_are_not_of_certificates():
    assert explain_certificate_error("https://x", OSError("no route")) is None
    assert explain_certificate_error("https://x", ssl.SSLError("EOF occurred")) is None


# Logins


def test_no_login_is_read_from_netrc(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("default login anonymous password guest\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with serving() as archive:
        fetch(f"{archive.url}/frame")
        query(archive.url)
        assert not any("Authorization" in headers for *_, headers, _ in archive.log)


def test_logins_do_not_go_to_other_hosts():
    with serving() as other:
        answers = [(302, {"Location": f"{other.url}/TAP/sync"}, b"")] * 2
        with serving(answers) as archive:
            url = archive.url.replace("//", "//me:secret@").replace("127.0.0.1", "localhost")
            fetch(f"{url}/frame", size=len(VOTABLE))
            query(url)
            assert all("Authorization" in headers for *_, headers, _ in archive.log)
        assert len(other.log) == 2
        assert not any("Authorization" in headers for *_, headers, _ in other.log)


# Encodings

ZIPPED = gzip.compress(BODY)


def zipped(body=ZIPPED, **headers):
    return 200, {"Content-Encoding": "gzip", "ETag": '"a"'} | headers, body


@pytest.mark.parametrize("size", [len(BODY), None])
def test_an_encoded_file_is_decoded(size):
    with serving([zipped()]) as archive:
        assert fetch(f"{archive.url}/frame", size) == BODY


def test_the_length_of_the_decoded_file_counts():
    with serving([zipped(gzip.compress(BODY[:-1]))] * 4) as archive:
        with pytest.raises(ArchiveError, match="the file has 4999 bytes, the archive lists 5000"):
            fetch(f"{archive.url}/frame")
        assert len(archive.log) == 4


def test_an_encoded_file_that_breaks_off_is_fetched_from_its_beginning():
    cut = zipped(ZIPPED[:20], **{"Content-Length": len(ZIPPED), "Connection": "close"})
    with serving([cut, cut, zipped()]) as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        assert [headers.get("Range") for *_, headers, _ in archive.log] == [None] * 3


def test_a_range_that_is_encoded_is_not_appended():
    length = {"Content-Length": len(BODY), "Connection": "close", "ETag": '"a"'}
    part = {"Content-Encoding": "gzip", "ETag": '"a"', "Content-Range": "bytes 1000-4999/5000"}
    answers = [(200, length, BODY[:1000]), (206, part, gzip.compress(BODY[1000:])), zipped()]
    with serving(answers) as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        ranges = [headers.get("Range") for *_, headers, _ in archive.log]
    assert ranges == [None, "bytes=1000-", None]


def test_a_range_that_brings_nothing_is_not_asked_for_again():
    length = {"Content-Length": len(BODY), "Connection": "close", "ETag": '"a"'}
    part = {"Content-Range": "bytes 1000-4999/5000", "Connection": "close", "ETag": '"a"'}
    nothing = (206, part | {"Content-Length": 4000}, b"")
    with serving([(200, length, BODY[:1000]), nothing]) as archive:
        assert fetch(f"{archive.url}/frame") == BODY
        ranges = [headers.get("Range") for *_, headers, _ in archive.log]
    assert ranges == [None, "bytes=1000-", None]


# Redirects of queries


def form_of(request):
    command, path, headers, body = request
    return command, path, headers.get("Content-Type", ""), body


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_service_that_moved_gets_the_query(status):
    with (
        serving() as there,
        serving([(status, {"Location": f"{there.url}/TAP/sync"}, b"")]) as here,
    ):
        assert query(here.url) == ["x"]
        [asked], [again] = here.log, there.log
    assert form_of(asked) == form_of(again)
    assert form_of(asked)[0] == "POST"
    assert b"QUERY=SELECT+1" in asked[3]


def test_a_service_that_moved_to_https(monkeypatch, authority):
    path, make_context = authority
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
    with (
        serving(context=make_context()) as there,
        serving([(301, {"Location": f"{there.url}/TAP/sync"}, b"")]) as here,
    ):
        assert query(here.url) == ["x"]
        assert [command for command, *_ in there.log] == ["POST"]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_an_answer_that_is_elsewhere_is_fetched(status):
    with serving([(status, {"Location": "/TAP/results/1?format=votable"}, b"")]) as archive:
        assert query(archive.url) == ["x"]
        (_, get) = archive.log
    assert form_of(get) == ("GET", "/TAP/results/1?format=votable", "", b"")


def test_a_redirect_that_does_not_help_is_named():
    answers = [(302, {"Location": "/login?to=tap"}, b""), (403, {}, b"sign in")]
    with serving(answers) as archive:
        with pytest.raises(ArchiveError) as caught:
            query(archive.url)
        assert f"redirected to {archive.url}/login?to=tap, refused the query" in str(caught.value)


def test_redirects_of_a_query_end():
    with serving([(302, {"Location": "/TAP/sync"}, b"")] * 20) as archive:
        with pytest.raises(ArchiveError, match="redirected more than 10 times"):
            query(archive.url)
        assert len(archive.log) == 11


@pytest.mark.parametrize("location", ["ftp://archive.test/TAP/sync", "", "http://[example]/"])
def test_redirects_that_are_not_followed(location):
    with serving([(302, {"Location": location}, b"")] * 20) as archive:
        with pytest.raises(ArchiveError, match="redirected to"):
            query(archive.url)
        assert len(archive.log) == 1


def test_the_wait_for_another_attempt_is_logged_with_its_reason(caplog):
    caplog.set_level(logging.INFO)
    with serving([(503, {"Retry-After": "0"}, b"")]) as archive:
        fetch(f"{archive.url}/frame")
    assert "HTTP 503 Service Unavailable; trying again in 0.0 s" in caplog.text
