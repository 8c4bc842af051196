import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cache_schema.storage import open_storage
from pipeline.cli import app
from pipeline.config.load import SETTINGS, ConfigError, load_config
from pipeline.config.text import commented_yaml

WORDS = st.text("abcxyz0123456789._-/ é[]{}#:,", min_size=1, max_size=12)


def number(low, high):
    return st.floats(low, high, allow_nan=False)


# One valid override each: dotted key, how it is written, the value it must become.
VALID = {
    "name": WORDS,
    "cache": WORDS,
    "outputs": WORDS.map(Path),
    "data.num_frames": st.integers(1, 20).map(lambda n: 8 * n + 1),
    "data.height": st.integers(1, 90).map(lambda n: 16 * n),
    "data.fps": st.none() | number(0.1, 60),
    "model.revision": st.none() | WORDS,
    "extract.kinds": st.lists(
        st.sampled_from(["teacher", "latents", "text"]), min_size=1, unique=True
    ).map(tuple),
    "extract.max_skipped": number(0, 1),
    "extract.latents.tiling": st.booleans(),
    "train.steps": st.integers(1, 10**9),
    "train.method": st.sampled_from(["lora", "full"]),
    "train.stores.teacher": st.lists(WORDS, min_size=1, max_size=3).map(tuple),
    "train.lora.target_modules": st.lists(WORDS, min_size=1, max_size=3).map(tuple),
    "train.optimizer.learning_rate": st.floats(1e-12, 1e3),
    "train.optimizer.betas": st.tuples(number(0, 1), number(0, 1)),
    "sample.num_frames": st.none() | st.integers(1, 20).map(lambda n: 8 * n + 1),
    "demo": st.none(),
}
OVERRIDES = st.sampled_from(sorted(VALID)).flatmap(
    lambda path: st.tuples(st.just(path), VALID[path])
)


def as_yaml(value):
    """Written by hand, not by the code under test."""
    if isinstance(value, tuple):
        return "[" + ", ".join(as_yaml(one) for one in value) + "]"
    if isinstance(value, str | Path):
        return "'" + str(value) + "'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def at(config, path):
    value = config
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(override=OVERRIDES)
def test_a_valid_override_arrives_and_survives_being_written_out(minimal, tmp_path, override):
    path, value = override
    config = load_config(minimal, [f"{path}={as_yaml(value)}"])
    assert at(config, path) == value
    written = tmp_path / "written.yaml"
    written.write_text(commented_yaml(config), encoding="utf-8")
    assert load_config(str(written)) == config


def test_written_configuration_shows_every_setting_with_its_help(minimal):
    text = commented_yaml(load_config(minimal, ["demo.seed=1"]))
    joined = re.sub(r"\n *# ", " ", text)
    for path, setting in SETTINGS.items():
        assert re.search(rf"^ *{path.rpartition('.')[2]}:", text, re.MULTILINE), path
        assert setting.help, f"{path} has no help"
        assert setting.help in joined, path


def test_later_overrides_win_and_leave_their_neighbours(minimal):
    config = load_config(minimal, ["train.steps=5", "train.seed=7", "train.steps=6"])
    assert (config.train.steps, config.train.seed) == (6, 7)


@pytest.mark.parametrize("pattern", ["{00000..00003}.tar", "*.tar", "[0-3].tar", "a/{0,1}.tar"])
def test_patterns_of_tars_are_no_yaml(minimal, pattern):
    assert load_config(minimal, [f"data.path={pattern}"]).data.path == Path(pattern)


def test_a_pattern_that_the_shell_expanded_is_refused(minimal):
    expanded = [f"data.path=clips/{number:05d}.tar" for number in range(4)]
    with pytest.raises(ConfigError, match="in quotes, so that the shell"):
        load_config(minimal, expanded)
    assert load_config(minimal, expanded[:1] * 2).data.path == Path("clips/00000.tar")


def test_references_follow_overrides_and_defaults(minimal):
    config = load_config(
        minimal, ["data.path=${demo.root}/clips", "demo.root=elsewhere", "outputs=${cache}-out"]
    )
    assert config.data.path == Path("elsewhere/clips")
    assert config.outputs == Path("cache-out")


def test_home_folder_is_filled_in(minimal, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(minimal, ["data.path=~/clips"]).data.path == Path("/home/somebody/clips")


def test_a_configuration_is_frozen(minimal):
    with pytest.raises(ValueError, match="frozen"):
        load_config(minimal).name = "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "unknown key train.lerning_rate; did you mean "
         "train.optimizer.learning_rate?"),
        ("trian.steps=1", "unknown key trian.steps; did you mean train.steps?"),
        ("learning_rate=1", "did you mean train.optimizer.learning_rate?"),
        ("train.lgf.raduis=1", "did you mean train.lgf.radius?"),
        ("train.foo=1", "unknown key train.foo; train has run_dir, steps,"),
        ("train.steps.x=1", "unknown key train.steps.x; train has"),
        ("train.steps", "'train.steps' is not key=value; overrides look like train.steps=20"),
        ("=1", "is not key=value"),
        ("train.steps=[1", "train.steps: cannot read the value '[1'"),
        ("train.lgf=1", "train.lgf is a section; set one of its keys"),
        ("train=null", "train is a section"),
        ("train.lgf.radius=0", "train.lgf.radius must be >= 1, got 0\n"
         "    Half the window; 3 gives the 7x7 window of a public re-implementation."),
        ("train.optimizer.learning_rate=0", "must be > 0, got 0\n    Peak learning rate;"),
        ("train.optimizer.learning_rate=fast", "must be a number, got 'fast'"),
        ("extract.max_skipped=2", "must be <= 1, got 2"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("train.steps=true", "train.steps must be a number, got true"),
        ("train.optimizer.betas=[0.9, true]", "train.optimizer.betas must be a number, got true"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1 is missing"),
        ("train.gradient_checkpointing=3", "must be true or false, got 3"),
        ("train.method=loar", "train.method must be one of 'lora' or 'full', got 'loar'"),
        ("extract.kinds=[]", "extract.kinds must be at least 1 long, got []"),
        ("extract.kinds=teacher", "extract.kinds must be a list, such as [a, b], got 'teacher'"),
        ("data.height=17", "data.height must be a multiple of 16, got 17"),
        ("data.num_frames=50", "data: num_frames must be 8N+1, got 50; 49 is usual"),
        ("data.num_frames=13", "data: num_frames must be 8N+1, got 13"),
        ("sample.num_frames=13", "sample: num_frames must be 8N+1, got 13"),
        ("data.path=123", "data.path must be a path, got 123; put it in quotes"),
        ("train.stores.teacher=1", "train.stores.teacher.0 must be text, got 1; put it in quotes"),
        ("data.fps=.inf", "data.fps must be finite, got inf"),
        ("data.fps=.nan", "data.fps must be finite, got nan"),
        ("data.path=${demo.rot}/x", "data.path refers to ${demo.rot}: unknown key demo.rot; did "
         "you mean demo.root?"),
        ("data.path=${train}", "data.path refers to ${train}, which is not a single value"),
        ("data.path=null", "data.path must be a path, got null"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_used_says_what_to_write_instead(minimal, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert message in str(caught.value)


def test_a_reference_to_a_reference_is_refused(minimal):
    with pytest.raises(ConfigError, match="which is a reference itself"):
        load_config(minimal, ["cache=${outputs}", "outputs=${name}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {path: x}\nmodel: {path: y}\n", "name is missing"),
        (
            "name: x\ndata: {path: x}\nmodel: {path: y}\ntrain: {step: 1}\n",
            "did you mean train.s",
        ),
        ("name: x\nname: y\n", 'line 2: found duplicate key "name"'),
        ("name: x\ndata: {path: x}\nmodel: {path: y}\n1: .inf\n", "1 must be finite"),
        ("name: x\ndata: {path: x}\nmodel: {path: y}\n1: 2\n", "unknown key 1; "),
        ("name: x\ndata: 3\nmodel: {path: y}\n", "data must be a section with keys of its own"),
        ("", "holds no settings"),
        ("- a\n", "holds no settings"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert message in str(caught.value)


def test_every_problem_of_a_file_is_told_at_once(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\ndata: {path: x}\nmodel: {path: y}\ntrain: {steps: 0, sede: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "train.steps must be >= 1" in str(caught.value)
    assert "did you mean train.seed?" in str(caught.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no preset and no file called 'dmeo'; .*demo"):
        load_config("dmeo")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(str(tmp_path / "binary.yaml"))


def test_the_configuration_kept_with_a_run_loads_again(minimal, tmp_path):
    from stages.train_student.run_folder import open_run

    config = load_config(minimal, ["name='1e5'", "train.stores.text='on'", "demo.root='ä: x'"])
    resolved = config.model_dump(mode="json")
    open_run(tmp_path / "run", {}, resolved, {}, clips={}, held_out=(), leave_out=None)
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config


def test_credentials_are_neither_kept_with_a_run_nor_compared(minimal, tmp_path):
    from stages.train_student.run_folder import open_run

    def open_with(secret):
        url = f"http://me:{secret}@host/cache"
        config = load_config(minimal, [f"cache={url}"])
        about = {"provenance": {"arguments": [f"cache={url}"]}}
        resolved, rest = config.model_dump(mode="json"), {"held_out": (), "leave_out": None}
        open_run(tmp_path / "run", {"train.a": url}, resolved, about, clips={}, **rest)

    open_with("s3cr3t")
    for file in ("run.json", "config.yaml"):
        text = (tmp_path / "run" / file).read_text()
        assert "s3cr3t" not in text
        assert "http://***@host/cache" in text
    open_with("0ther")
    # A run that an older version wrote down with them.
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("***", "me:s3cr3t"))
    open_with("0ther")
    again = str(tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match="without its credentials"):
        open_storage(load_config(again).cache_root)
    url = "http://me:0ther@host/cache"
    assert load_config(again, [f"cache={url}"]).cache_root == url


class TestExtends:
    @pytest.fixture
    def write(self, tmp_path):
        def write(name, text):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return str(path)

        return write

    def test_a_file_holds_only_what_differs_from_a_preset(self, write):
        mine = write("mine.yaml", "extends: demo\nname: mine\ntrain: {lgf: {radius: 1}}\n")
        config, demo = load_config(mine, ["train.steps=7"]), load_config("demo")
        lgf = demo.train.lgf.model_copy(update={"radius": 1})
        changes = {"lgf": lgf, "steps": 7}
        train = demo.train.model_copy(update=changes)
        assert config == demo.model_copy(update={"name": "mine", "train": train})

    def test_files_extend_each_other_from_where_they_lie(self, write, monkeypatch, tmp_path):
        write("base/one.yaml", "name: one\ndata: {path: x, fps: 8}\nmodel: {path: y}\n")
        write("base/two.yaml", "extends: one.yaml\ndata: {fps: 16, num_frames: 9}\n")
        top = write("mine/three.yaml", "extends: ../base/two.yaml\nmodel: {path: z}\n")
        monkeypatch.chdir("/")
        config = load_config(top)
        assert (config.name, config.data.path, config.model.path) == ("one", Path("x"), "z")
        assert (config.data.fps, config.data.num_frames) == (16, 9)

    def test_lists_and_nulls_take_the_place_of_what_was_there(self, write):
        mine = write(
            "mine.yaml",
            "extends: demo\ndemo: null\ncache: c\noutputs: o\ndata: {path: x}\nmodel: {path: y}\n"
            "extract: {teacher: {checkpoint: a, config: b}}\n"
            "train: {run_dir: r, lgf: {projector_widths: [1, 2, 3]}}\n",
        )
        config = load_config(mine)
        assert config.demo is None
        assert config.train.lgf.projector_widths == (1, 2, 3)
        assert config.train.lgf.radius == 2

    def test_a_written_out_configuration_extends_nothing(self, write):
        config = load_config(write("mine.yaml", "extends: demo\nname: mine\n"))
        assert load_config(write("written.yaml", commented_yaml(config))) == config
        assert not re.search(r"^\s*extends", commented_yaml(config), re.MULTILINE)

    def test_a_circle_is_refused_and_shown(self, write):
        write("a.yaml", "extends: b.yaml\n")
        write("b.yaml", "extends: x/../c.yaml\n")
        first = write("c.yaml", "extends: a.yaml\n")
        write("x/nothing.yaml", "")
        with pytest.raises(ConfigError) as caught:
            load_config(first)
        names = re.findall(r"(\w)\.yaml", str(caught.value))
        assert names == ["c", "a", "b", "c"]
        itself = write("d.yaml", "extends: d.yaml\n")
        with pytest.raises(ConfigError, match=r"d\.yaml extends /.*d\.yaml, in a circle"):
            load_config(itself)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("extends: dmeo\n", r"mine.yaml extends 'dmeo', but there is no preset and no file"),
            ("extends: 3\n", r"mine.yaml: extends must be a preset or the path of a file, got 3"),
            ("extends: [demo]\n", "extends must be a preset"),
            ("extends: ''\n", "extends must be a preset"),
            ("extends: empty.yaml\n", "empty.yaml holds no settings"),
            ("extends: demo\ntrain: {step: 1}\n", "did you mean train.steps"),
            ("extends: demo\ntrain: 3\n", "train must be a section"),
            ("train: {extends: demo}\n", "unknown key train.extends"),
        ],
    )
    def test_what_cannot_be_extended_says_why(self, write, text, message):
        write("empty.yaml", "")
        with pytest.raises(ConfigError, match=message):
            load_config(write("mine.yaml", text))

    def test_an_override_extends_nothing(self, minimal):
        with pytest.raises(ConfigError, match="only allowed in a file; use --config demo"):
            load_config(minimal, ["extends=demo"])


def show(*arguments):
    return CliRunner().invoke(app, ["config", "show", *arguments])


def test_config_show_prints_yaml_that_is_a_configuration(tmp_path):
    result = show("--config", "cogvideox-2b-lora", "train.steps=3")
    assert result.exit_code == 0
    path = tmp_path / "copy.yaml"
    path.write_text(result.stdout)
    assert show("--config", str(path)).stdout == result.stdout
    assert "# Optimizer steps; 2000 is usual." in result.stdout


def test_config_show_as_json_is_the_same_configuration():
    shown = json.loads(show("--config", "demo", "--json", "train.steps=3").stdout)
    assert shown["train"]["steps"] == 3
    assert shown["train"]["lgf"]["temperature"] == 0.1
