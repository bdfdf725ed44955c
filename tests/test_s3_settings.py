"""How train_cifar.py reaches other people's S3: settings, proxies, certificates, refusals.

Real servers on loopback: S3s that refuse, a console, a proxy, TLS with an authority of the house.
"""

import http.server
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import REPO, finish, refused, script_environment, start
from test_train_cifar_s3 import S3_SERVER, Server, free_port

import s3_server
import train_cifar
from common import InputError
from train_cifar import Bucket, LoadingError, list_objects

EXPORT = ("--dataset", "synthetic", "--subset", 20, "--quiet", "--retry-seconds", 3)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment with keys, without any other AWS setting, and without a proxy."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws of the user
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "notsecret12345")
    return monkeypatch


class Answering(http.server.ThreadingHTTPServer):
    """Gives every request the same answer and notes what it was asked for. An HTTP proxy too."""

    daemon_threads = True

    def __init__(self, status, body, certificate=None, **headers):
        super().__init__(("127.0.0.1", 0), AnsweringHandler)
        self.status = status
        self.body = body.encode()
        self.headers = headers
        self.requests = []
        scheme = "http"
        if certificate:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass  # clients that refuse the certificate hang up

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class AnsweringHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        self.send_response_only(self.server.status)
        self.send_header("Content-Length", len(self.server.body))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        for name, value in self.server.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.body)

    do_GET = do_PUT = do_HEAD = do_POST = answer  # noqa: N815

    def log_message(self, *_):
        pass


def error(code, message=""):
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'


PAGE = "<!doctype html><html><title>Console</title><body>Sign in</body></html>"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, error("RequestTimeTooSkewed"), "RequestTimeTooSkewed): set the clock"),
        (400, error("ExpiredToken"), "ExpiredToken): log in again"),
        (403, error("SecondLevelDomainForbidden"), "set addressing_style = virtual"),
        (301, error("PermanentRedirect"), "another region: set AWS_REGION=eu-central-1"),
        (
            400,
            error("AuthorizationHeaderMalformed", "'us-east-1' is wrong; expecting 'eu-west-9'"),
            "another region: set AWS_REGION=eu-west-9",
        ),
        (507, error("XMinioStorageFull"), "make room in the storage"),
        (403, error("InvalidObjectState"), "restore it first"),
        (403, error("AccessDenied"), "what these credentials permit"),
        (200, PAGE, "a web page, no S3, answers there"),
        (404, PAGE, "a web page, no S3, answers there"),
    ],
)
@pytest.mark.parametrize("option", ["--source", "--export"])
def test_an_s3_that_refuses_is_named_at_once(environment, status, body, words, option):
    """One request, a line that says what to do, and nothing is put there."""
    with Answering(status, body, x_amz_bucket_region="eu-central-1") as server:
        url = ("--endpoint-url", server.url, "--retry-seconds", 60)
        line = refused(train_cifar.main, option, "s3://cifar10/data", *EXPORT, *url)
    assert words in line
    assert f"s3://cifar10/data/manifest.json at {server.url}" in line
    kept = [request for request in server.requests if not request.startswith("HEAD")]
    assert kept == ["GET /cifar10/data/manifest.json"]


def test_an_s3_that_is_busy_is_asked_again(environment):
    with Answering(503, error("SlowDown")) as server:
        with pytest.raises(LoadingError, match=r"503 Service Unavailable \(SlowDown\), tried"):
            Bucket("s3://cifar10/data", server.url, 1.0).manifest()
    assert len(server.requests) > 1


# -- settings of the AWS tools -------------------------------------------------------------------


def settings(url=None):
    return Bucket("s3://cifar10/data", url).settings


CONFIG = """[default]
services = mine
region = eu-west-9
[services mine]
s3 =
  endpoint_url = http://127.0.0.1:1/gateway
[profile virtual]
s3 =
  addressing_style = virtual
[profile plain]
endpoint_url = http://127.0.0.1:2
[profile login]
sso_start_url = https://example.invalid/start
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = student
"""


def test_settings_are_those_of_the_aws_tools(environment):
    Path("config").write_text(CONFIG)
    environment.setenv("AWS_CONFIG_FILE", "config")
    found = settings()
    assert found.bucket_url == "http://127.0.0.1:1/gateway/cifar10"
    assert found.endpoint == "http://127.0.0.1:1/gateway"
    assert found.region == "eu-west-9"
    assert settings("http://127.0.0.1:3/").bucket_url == "http://127.0.0.1:3/cifar10"
    environment.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:4")
    environment.setenv("AWS_REGION", "us-west-2")
    assert settings().bucket_url == "http://127.0.0.1:4/cifar10"
    assert settings().region == "us-west-2"
    environment.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert settings().bucket_url == "https://cifar10.s3.us-west-2.amazonaws.com"
    assert settings().endpoint == "Amazon S3, us-west-2"

    environment.delenv("AWS_ENDPOINT_URL_S3")
    environment.delenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
    environment.setenv("AWS_PROFILE", "plain")
    assert settings().bucket_url == "http://127.0.0.1:2/cifar10"
    environment.setenv("AWS_PROFILE", "virtual")
    assert settings("http://s3.house:9").bucket_url == "http://cifar10.s3.house:9"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_ENDPOINT_URL": "localhost"}, "Invalid endpoint: localhost"),
        ({"AWS_ENDPOINT_URL": "http://me:notsecret12345@h"}, "give http(s)://host:port"),
        ({"AWS_PROFILE": "nobody"}, "(nobody) could not be found"),
        ({"AWS_PROFILE": "login", "AWS_ACCESS_KEY_ID": ""}, "SSO Token"),
        ({"AWS_CONFIG_FILE": "damaged"}, "Unable to parse config file"),
        ({"AWS_CA_BUNDLE": "nowhere.pem"}, "AWS_CA_BUNDLE"),
        ({"AWS_CA_BUNDLE": "damaged"}, "give a file with certificates"),
    ],
)
def test_a_bad_setting_is_one_line(environment, variables, words):
    Path("config").write_text(CONFIG)
    Path("damaged").write_text("nothing")
    environment.setenv("AWS_CONFIG_FILE", "config")
    for name, value in variables.items():
        environment.setenv(name, value)
    line = refused(train_cifar.main, "--source", "s3://cifar10/data", "--model", "cnn")
    assert words in line
    assert "notsecret12345" not in line


def test_endpoint_of_the_option_is_used_whatever_the_environment_says(environment):
    """obstore itself would prefer $AWS_ENDPOINT_URL_S3 to what it is given."""
    with Answering(403, error("AccessDenied")) as other, Answering(404, error("NoSuchKey")) as s3:
        environment.setenv("AWS_ENDPOINT_URL_S3", other.url)
        environment.setenv("AWS_ENDPOINT_URL", other.url)
        assert Bucket("s3://cifar10/data", s3.url).read_manifest() is None
    assert s3.requests
    assert not other.requests


def test_a_login_that_ends_during_a_run_is_named_at_once(environment):
    from botocore.exceptions import UnauthorizedSSOTokenError

    class Expired:
        def get_frozen_credentials(self):
            raise UnauthorizedSSOTokenError()

    bucket = Bucket("s3://cifar10/data", f"http://127.0.0.1:{free_port()}")
    bucket.settings = bucket.settings._replace(credentials=Expired())
    with pytest.raises(InputError, match="aws sso login"):
        bucket.manifest()


@pytest.mark.parametrize(
    "url",
    ["a//b", "/", "./b", "a/../b", "a\nb", "a/\x00"],
)
def test_a_prefix_that_s3_tools_read_differently_is_one_line(environment, url):
    with pytest.raises(InputError, match="not of the form s3://bucket/prefix"):
        Bucket(f"s3://cifar10/{url}")


@pytest.mark.parametrize("target", ["s3:/cifar10", "S3://cifar10", "https://h/cifar10", "gs://b"])
def test_export_to_an_address_makes_no_folder_of_that_name(environment, target):
    assert "give s3://bucket/prefix or a folder" in refused(train_cifar.main, "--export", target)
    assert not any(path.is_dir() for path in Path().iterdir())


# -- proxies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_no_proxy_is_asked_for_this_machine(environment, name):
    with Answering(502, PAGE) as proxy, Answering(404, error("NoSuchKey")) as s3:
        environment.setenv(name, proxy.url)
        for host in ("127.0.0.1", "localhost"):
            url = s3.url.replace("127.0.0.1", host)
            assert Bucket("s3://cifar10/data", url).read_manifest() is None
    assert not proxy.requests


def test_a_proxy_is_used_for_others_and_named(environment):
    """The address that the proxy is asked for has the bucket in its host name too."""
    Path("config").write_text(CONFIG)
    environment.setenv("AWS_CONFIG_FILE", "config")
    with Answering(407, "denied") as proxy:
        environment.setenv("http_proxy", proxy.url.replace("//", "//me:notsecret12345@"))
        with pytest.raises(InputError) as refusal:
            Bucket("s3://cifar10/data", "http://s3.house:9").manifest()
        environment.setenv("AWS_PROFILE", "virtual")
        with pytest.raises(InputError):
            Bucket("s3://cifar10/data", "http://s3.house:9").manifest()
    line = str(refusal.value)
    assert f"through the proxy {proxy.url.replace('//', '//…@')} (no_proxy=s3.house" in line
    assert "407 Proxy Authentication Required" in line
    assert "notsecret12345" not in line
    assert proxy.requests == [
        "GET http://s3.house:9/cifar10/data/manifest.json",
        "GET http://cifar10.s3.house:9/data/manifest.json",
    ]


# -- certificates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with an authority's certificate and one of its own for 127.0.0.1, by openssl."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make certificates")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=House",
        "req -newkey rsa:2048 -nodes -keyout key.pem -out request -subj /CN=s3",
        "x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 "
        "-extfile names",
    ):
        words = ["openssl", *command.split()]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder


def test_an_authority_of_the_house(environment, house):
    """From $AWS_CA_BUNDLE and from ca_bundle in the configuration; without, the cause is named."""
    certificate = (house / "cert.pem", house / "key.pem")
    with Answering(404, error("NoSuchKey"), certificate) as server:
        for url, words in (
            (server.url, "unknown authority: set AWS_CA_BUNDLE"),
            (server.url.replace("https", "http"), r"tried \d+ times"),
        ):
            started = time.monotonic()
            with pytest.raises((InputError, LoadingError), match=words):
                Bucket("s3://cifar10/data", url, 1.0).manifest()
            assert time.monotonic() - started < 30
        environment.setenv("AWS_CA_BUNDLE", str(house / "ca.pem"))
        assert Bucket("s3://cifar10/data", server.url).read_manifest() is None
        environment.delenv("AWS_CA_BUNDLE")
        Path("config").write_text(f"[default]\nca_bundle = {house / 'ca.pem'}\n")
        environment.setenv("AWS_CONFIG_FILE", "config")
        assert Bucket("s3://cifar10/data", server.url).read_manifest() is None
        with pytest.raises(InputError, match="for another host"):
            Bucket("s3://cifar10/data", server.url.replace("127.0.0.1", "localhost")).manifest()
    with Answering(404, error("NoSuchKey")) as server:
        with pytest.raises(InputError, match="no TLS is spoken there: try http://"):
            Bucket("s3://cifar10/data", server.url.replace("http", "https")).manifest()


# -- what is not ours ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The user's own S3."""
    with Server(tmp_path_factory.mktemp("other")) as server:
        yield server


def use(environment, server):
    for name, value in server.env.items():
        environment.setenv(name, value)
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_manifest_that_is_not_ours_is_not_replaced(environment, other, tmp_path, where):
    prefix = f"{where}-{os.getpid()}"
    folder = tmp_path / prefix
    target = str(folder)
    if where == "s3":
        use(environment, other)
        folder = other.folder / "s3/buckets/cifar10" / prefix
        target = f"s3://cifar10/{prefix}"
    folder.mkdir(parents=True)
    manifest = folder / "manifest.json"
    manifest.write_text('{"theirs": 1}')
    line = refused(train_cifar.main, "--export", target, *EXPORT)
    assert f"{target}/manifest.json is there already" in line
    assert "--overwrite" in line
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert manifest.read_text() == '{"theirs": 1}'

    words = [str(word) for word in EXPORT]
    train_cifar.main(["--export", target, "--overwrite", *words])
    ours = manifest.read_text()
    assert "train-shards/00.bin" in ours
    train_cifar.main(["--export", target, *words])  # ours, and it may be replaced
    assert manifest.read_text() == ours


@pytest.mark.parametrize("prefix", ["a b", "a?b#c", "%41", "ünïcode", "deep/er/still"])
def test_prefixes_with_characters_that_urls_escape(environment, other, prefix):
    use(environment, other)
    words = [str(word) for word in EXPORT]
    train_cifar.main(["--export", f"s3://cifar10/{prefix}", *words])
    assert (other.folder / "s3/buckets/cifar10" / prefix / "manifest.json").exists()
    bucket = Bucket(f"s3://cifar10/{prefix}")
    assert len(bucket.manifest()["train"]) == 20
    assert "train-shards/00.bin" in list_objects(bucket.connect())


def their_environments(folder):
    """Environments of people who use another S3: keys, endpoints, profiles, logins, roles."""
    url = f"http://127.0.0.1:{free_port()}"
    keys = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "notsecret12345"}
    yield {**keys, "AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url, "AWS_REGION": "eu-west-9"}
    yield {"AWS_PROFILE": "work", "AWS_CONFIG_FILE": str(folder / "theirs")}
    role = {"AWS_ROLE_ARN": "arn:aws:iam::1:role/r", "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere"}
    ignore = {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "AWS_USE_FIPS_ENDPOINT": "true"}
    yield {**role, **ignore, "AWS_CA_BUNDLE": "/nowhere", "AWS_SESSION_TOKEN": "x"}
    rclone = {"RCLONE_READ_ONLY": "true", "RCLONE_BASEURL": "theirs", "RCLONE_ADDR": ":1"}
    yield {**rclone, "AWS_CONTAINER_CREDENTIALS_FULL_URI": url, "http_proxy": url}


EXPORT_AND_SHOW = """import sys
sys.path.insert(0, sys.argv[1])
import train_cifar
train_cifar.main(sys.argv[2:])
settings = train_cifar.Bucket("s3://cifar10").settings
print(settings.bucket_url, settings.credentials.access_key, settings.region, settings.proxy)
"""


@pytest.mark.slow
def test_a_command_of_the_server_sees_that_server_alone(tmp_path):
    """Whatever the user has set; the server itself is not changed by it either."""
    (tmp_path / "theirs").write_text("[profile work]\nregion = eu-west-9\n")
    export = ["--export", "s3://cifar10", *EXPORT]
    for env in their_environments(tmp_path):
        command = [sys.executable, "-c", EXPORT_AND_SHOW, REPO, *export]
        out, _ = finish(start(tmp_path, S3_SERVER, *command, env=env))
        endpoint = (tmp_path / ".s3/config").read_text().rpartition("endpoint_url = ")[2].strip()
        key = (tmp_path / ".s3/credentials").read_text().split()[3]
        shown = out.splitlines()[-1].split()
        assert shown == [f"{endpoint}/cifar10", key, "us-east-1", "None"], env
        assert (tmp_path / ".s3/buckets/cifar10/manifest.json").exists()
        shutil.rmtree(tmp_path / ".s3")


def test_commands_see_nothing_of_the_users_aws_settings(environment, tmp_path):
    for env in their_environments(tmp_path):
        for name, value in env.items():
            environment.setenv(name, value)
    environment.setenv("no_proxy", "house")
    env = s3_server.client_environment(tmp_path)
    assert {name: value for name, value in env.items() if name.startswith("AWS_")} == {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    assert env["no_proxy"] == "house,127.0.0.1"
    assert env["NO_PROXY"] == "127.0.0.1"
    assert env["PATH"] == os.environ["PATH"]


def test_printed_commands_can_be_pasted_into_a_shell(environment, tmp_path):
    """They set the two files, whose folder may have any name, and unset what would come first."""
    folder = tmp_path / "it's a $HOME; folder"
    environment.setenv("AWS_PROFILE", "work")
    commands = "\n".join(s3_server.shell_commands(folder))
    assert "unset" in commands
    done = subprocess.run(
        ["sh", "-c", f"{commands}\nenv"],
        env=script_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("AWS_")]
    assert sorted(lines) == [
        f"AWS_CONFIG_FILE={folder}/config",
        f"AWS_SHARED_CREDENTIALS_FILE={folder}/credentials",
    ]
    assert shlex.split(commands)[0] == "unset"
