"""Presets, TOML, flags, and one clear line for every mistake."""

import ast
import dataclasses
import inspect
import itertools
import math
import re
import time
import tomllib

import pytest

from gpt2_jax import config as config_module
from gpt2_jax.checkpoint_info import COMPLETE
from gpt2_jax.config import TrainConfig, differences, flatten
from gpt2_jax.config.flags import parse_args
from gpt2_jax.config.toml import PRESETS, preset_names, read_config, to_toml
from gpt2_jax.config.validation import validate
from gpt2_jax.errors import UserError
from gpt2_jax.run.directory import saved_config, write_config


def parse(*args):
    return parse_args("train", "Train.", list(args))


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_survive_the_round_trip(name, tmp_path):
    config = read_config(name)
    validate(config)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_config(str(tmp_path / "config.toml")) == config


def test_every_preset_header_shows_its_arithmetic_and_the_loss_to_expect():
    for path in PRESETS.glob("*.toml"):
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert re.search(r"^# .* × .*", header, re.MULTILINE), path
        assert "Loss:" in header, path


def test_toml_holds_every_key_and_every_kind_of_value(tmp_path):
    config = read_config("quickstart")
    data = dataclasses.replace(config.data, characters='\n !"#\\\x7fé😀')
    config = dataclasses.replace(config, data=data, batch_ramp=((1000, 4), (2000, 8)))
    text = to_toml(config)
    table = tomllib.loads(text)
    assert sum(len(value) if isinstance(value, dict) else 1 for value in table.values()) == len(flatten(config))
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    assert read_config(str(path)) == config


@pytest.mark.parametrize(
    ("name", "parameters"),  # OpenAI's tables say 117M, 345M, 762M and 1542M; these are the counts of the files
    [("gpt2-124m", 124_439_808), ("gpt2-355m", 354_823_168), ("gpt2-774m", 774_030_080), ("gpt2-1558m", 1_557_611_200)],
)
def test_presets_have_the_sizes_of_the_released_models(name, parameters):
    model = read_config(name).model
    width = model.n_embd
    per_layer = 12 * width * width + 13 * width  # 4 matrices of 12 C², their biases 9 C, two norms 4 C
    total = (model.vocab_size + model.block_size) * width + model.n_layer * per_layer + 2 * width
    assert total == parameters


def test_flags_override_the_preset():
    config = parse("--config", "gpt2-124m", "--steps=7000", "--model.n-layer", "3", "--optimizer.beta2", "0.9")
    assert (config.steps, config.model.n_layer, config.optimizer.beta2) == (7000, 3, 0.9)
    assert config.data == read_config("gpt2-124m").data
    assert parse("--config", "quickstart", "--model.bias", "false").model.bias is False
    assert parse("--config", "quickstart", "--batch_ramp", "1000", "2", "2000", "4").batch_ramp == (
        (1000, 2),
        (2000, 4),
    )


def help_of(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        parse(*args)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_every_key_is_in_the_help_of_its_section_in_less_than_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = read_config("gpt2-124m")
    for section in ("", *(field.name for field in dataclasses.fields(config) if "Config" in field.type)):
        text = help_of(capsys, "--config", "gpt2-124m", "--help", *[section] * bool(section))
        assert max(map(len, text.splitlines())) <= 80
        assert text.count("\n") <= 36
        keys = flatten(getattr(config, section), f"{section}.") if section else flatten(config)
        for key in keys.keys() - {"data.sources"}:
            assert f"--{key} " in text or (not section and f"  {key.split('.')[0]} " in text)
    assert "--optimizer.clip_norm 1.0 " in help_of(capsys, "--help", "optimizer")  # by default
    assert "--optimizer.learning_rate 0.002 " in help_of(capsys, "-h", "optimizer", "--config", "quickstart")


def test_the_help_of_a_key_says_all_about_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = help_of(capsys, "--config", "shakespeare-char", "--help", "model.dropout")
    assert text.startswith("--model.dropout 0.2\na number; by default 0.0\n\nDropout rate of the embeddings")
    assert "\nauto or none or dots or full; by default none\n" in help_of(capsys, "--help", "model.remat")
    text = help_of(capsys, "--help", "model.vocab_size")
    assert "0 takes it from the tokenizer.\nThe model pads it to a multiple of 128 internally.\n" in text
    with pytest.raises(UserError, match=r"--help model.layer: no key and no section; did you mean model.n_layer\?"):
        parse("--help", "model.layer")


def test_help_breaks_lines_between_sentences_only():
    """The help shows the first line of a field's docstring where there is room for one."""
    for node in ast.walk(ast.parse(inspect.getsource(config_module))):
        if isinstance(node, ast.ClassDef):
            for field, docstring in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                    for line in ast.literal_eval(docstring.value).splitlines():
                        assert line.endswith("."), line


def test_without_a_config_the_presets_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert all(f"{name} {header[:40]}" in words for name, header in preset_names().items())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_takes_fewer_steps_as_typed(name):
    whole, lines = read_config(name), []
    for steps in (1, 10, 100, whole.steps - 1):
        config = parse_args("train", "", ["--config", name, "--steps", str(steps)], lines.append)
        if whole.optimizer.warmup_steps <= steps:  # it fits, and stays
            assert config == dataclasses.replace(whole, steps=steps)
            assert not lines
        else:
            warmup = max(round(whole.optimizer.warmup_steps * steps / whole.steps), 1)
            optimizer = dataclasses.replace(whole.optimizer, warmup_steps=warmup)
            assert config == dataclasses.replace(whole, steps=steps, optimizer=optimizer)
            assert lines.pop().startswith(f"--steps {steps} is shorter than the warmup of")


def test_a_warmup_that_was_typed_is_not_changed(tmp_path):
    for flag in ("--optimizer.warmup_steps", "--optimizer.warmup-steps"):
        with pytest.raises(UserError, match=r"warmup_steps = 240 is more than the 100 updates"):
            parse("--config", "quickstart", "--steps", "100", flag, "240")
        assert parse("--config", "quickstart", "--steps", "100", flag, "7").optimizer.warmup_steps == 7
        assert parse("--config", "quickstart", "--steps=100", f"{flag}=7").optimizer.warmup_steps == 7
        with pytest.raises(UserError, match=r"warmup_steps = 240 is more than the 100 updates"):
            parse("--config", "quickstart", "--steps=100", f"{flag}=240")
    (tmp_path / "mine.toml").write_text("out='x'\nsteps=100\nbatch_size=1\n[data]\ntext='t'\n")
    with pytest.raises(UserError, match=r"warmup_steps = 715 is more than the 100 updates"):
        parse("--config", str(tmp_path / "mine.toml"))
    config = parse("--config", "quickstart", "--steps", "100", "--optimizer.decay_steps", "8000")
    assert config.optimizer.warmup_steps == 240  # 100 updates of a schedule of 8,000


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("model.vocab_size", 2**31),
        ("model.n_embd", 2**31),
        ("model.n_head", 2**31),
        ("model.n_layer", 10**9),
        ("model.block_size", 2**31),
        ("model.loss_chunk", 2**40),
        ("batch_size", 2**31),
        ("batch_size", 10**30),
        ("micro_batch_size", 10**30),
        ("steps", 2**40),
        ("optimizer.warmup_steps", 2**40),
        ("optimizer.decay_steps", 2**40),
        ("optimizer.learning_rate", 1e39),
        ("optimizer.weight_decay", 1e39),
        ("mesh.data", 2**40),
        ("checkpoint.keep", 10**30),
        ("eval.tokens", 10**30),
        ("eval.sample_tokens", 2**40),
    ],
)
def test_sizes_beyond_any_machine_are_refused(flag, value):
    with pytest.raises(UserError, match=rf"^{flag} = .*; expected .*at most "):
        parse("--config", "quickstart", f"--{flag}", str(value))


def test_sizes_that_are_large_together_are_refused():
    with pytest.raises(UserError, match=r"make about .* parameters; expected at most"):
        parse("--config", "quickstart", "--model.n_layer", "1024", "--model.n_embd", "12288")
    with pytest.raises(
        UserError, match=r"tokens per update; expected at most 2,147,483,647; type --batch_size 2097151"
    ):
        parse("--config", "gpt2-124m", "--batch_size", "2097152")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nope"], "--config nope: No such file.*quickstart"),
        (["--config", "quickstart", "--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
        (["--config", "quickstart", "--n_layer", "3"], "did you mean --model.n_layer"),
        (["--config", "quickstart", "--lr", "3"], "unknown flag --lr; did you mean --"),
        (["--config", "quickstart", "--batch_ramp", "1"], "batch_ramp"),
        (["--config", "quickstart", "--seed", "4294967296"], "seed = 4294967296; expected .* below"),
        (["--config", "quickstart", "--steps", "many"], "--steps: invalid literal"),
        (["--config", "quickstart", "--steps"], "Missing value for argument '--steps'"),
        (["--config", "quickstart", "--model.attention", "flash"], "invalid choice 'flash'.*'splash'"),
        (["--config", "quickstart", "--steps", "0"], "steps = 0; expected at least 1"),
        (
            ["--config", "quickstart", "--model.n_head", "7"],
            "a multiple of model.n_head = 7; type --model.n_head 6",
        ),
        (["--config", "quickstart", "--model.dropout", "1"], "model.dropout = 1.0; expected 0 or more and below 1"),
        (["--config", "quickstart", "--optimizer.learning_rate", "nan"], "learning_rate = nan"),
        (["--config", "quickstart", "--optimizer.warmup_steps", "10000000"], "is more than the .* updates"),
        (["--config", "quickstart", "--batch_ramp", "2000", "8", "1000", "16"], "batch_ramp .* tokens rising"),
        (
            ["--config", "quickstart", "--data.text="],
            "no training data is set; type --data.text .* or --data.train",
        ),
        (
            ["--config", "quickstart", "--data.train", "x.bin"],
            "data.text = 'stdlib' and data.train = 'x.bin' are both set; .* type --data.text= with --data.train and",
        ),
        (["--config", "quickstart", "--data.val", "x.bin"], "data.val = 'x.bin' is set with data.text.* --data.val="),
        (["--config", "gpt2-124m", "--data.val="], "data.train = .* without validation data; type --data.val FILES"),
        (
            ["--config", "quickstart", "--data.tokenizer", "chars", "--data.document_starts", "true"],
            "needs an end-of-text token, and data.tokenizer = 'chars' has none; type --data.document_starts false",
        ),
        (["--config", "quickstart", "--mesh.data", "-1", "--mesh.fsdp", "-1"], "both -1; .* type --mesh.fsdp 1"),
        (["--config", "quickstart", "--mesh.data", "0"], "mesh.data = 0; expected at least 1, or -1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "not TOML"),
        ("out = 'x'\nsteps = 3", "missing key batch_size; write batch_size ="),
        ("stepz = 3", "unknown key stepz; did you mean steps?"),
        ("n_layer = 3", "unknown key n_layer; did you mean model.n_layer?"),
        ("[model]\nlearning_rate = 3", "unknown key model.learning_rate; did you mean optimizer.learning_rate?"),
        ("[model]\nn_leyer = 3", "unknown key model.n_leyer; did you mean model.n_layer?"),
        ("model = 3", "model is a section; write \\[model\\]"),
        ("steps = '3'", "steps = '3'; expected int, found str"),
        ("steps = true", "steps = True; expected int, found bool"),
        ("dtype = 'float64'", "dtype = 'float64'; expected one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("batch_ramp = [[1, 2, 3]]", "batch_ramp = .* expected a list of pairs"),
        ("[data]\nsources = 3", r"data.sources = 3; expected tables; write \[\[data.sources\]\] for each"),
    ],
)
def test_mistakes_in_a_file_are_one_clear_line(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(str(path))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("out='x'\nsteps=7\nbatch_size=1\n", encoding="utf-8-sig")
    assert read_config(str(path)).steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_ramp = " + "[" * 20_000, "it is nested more than 64 deep"),
        ("batch_ramp = " + "{a=" * 20_000, "it is nested more than 64 deep"),
        ("a" + ".a" * 200_000 + " = 1", "a key has more than 64 parts"),
        ("[a" + ' . "b"' * 20_000 + "]", "a key has more than 64 parts"),
        ("batch_ramp = [" + "1," * 7_000_000 + "]", "it has more than 1,048,576 bytes"),
        ("x" * 1_000_000 + " = 1", "unknown key x{100}; did you mean"),
        ("steps = [" + "1," * 300_000 + "]", "expected int, found list"),
        ("steps = " + "9" * 10_000, "not TOML"),
        ("optimizer.learning_rate = 1" + "0" * 400, "not TOML: learning_rate is an integer of more than 64 bits"),
        ("seed = 0x" + "f" * 10_000, "not TOML: seed is an integer of more than 64 bits"),
        ("dtype = [[1, 0b1" + "0" * 63 + "]]", "not TOML: dtype is an integer of more than 64 bits"),
    ],
)
def test_configs_beyond_every_limit_are_refused_at_once(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        read_config(str(path))
    assert time.perf_counter() - start < 10  # 1.5 s on an idle machine
    assert len(str(error.value)) < 1000


def test_brackets_and_dots_in_strings_and_comments_do_not_count(tmp_path):
    path = tmp_path / "mine.toml"
    deep, dots = "[{" * 100, "." * 100
    path.write_text(
        f"# {deep} {dots} '\nout='{deep}\\'\nsteps=7 # \"\nbatch_size=1\n[data]\n"
        f'text="{dots}\\"{deep}"\ncharacters="""{deep}""{dots}\\"""""\ntrain=\'\'\'{deep}\'\'{dots}\'\'\'\n'
    )
    config = read_config(str(path))
    assert config.out == deep + "\\"
    assert (config.data.text, config.data.characters) == (f'{dots}"{deep}', f'{deep}""{dots}""')
    assert config.data.train == f"{deep}''{dots}"


SOURCES = "out='x'\nsteps=1000\nbatch_size=1\n[data]\nval='val'\n[[data.sources]]\ntrain='a'\nweight="


@pytest.mark.parametrize(
    ("weight", "flags", "message"),
    [
        ("1", [], None),
        ("0.0", [], "the source 'a' in data.sources has weight = 0.0; expected a finite number above 0"),
        ("1", ["--data.val="], r"\[\[data.sources\]\] is set without validation data"),
        ("1", ["--data.train", "b"], r"data.train = 'b' and \[\[data.sources\]\] are both set; .* type --data.train="),
        ("1", ["--data.text", "c"], r"data.text = 'c' and \[\[data.sources\]\] are both set"),
    ],
)
def test_mistakes_with_several_sources_are_one_clear_line(weight, flags, message, tmp_path):
    (tmp_path / "mine.toml").write_text(SOURCES + weight)
    args = ["--config", str(tmp_path / "mine.toml"), *flags]
    if message is None:
        assert parse(*args).data.sources[0].weight == 1
        return
    with pytest.raises(UserError, match=message):
        parse(*args)


def test_a_key_that_an_earlier_version_wrote_is_left_out_and_named(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("out='x'\nsteps=1\nbatch_size=1\n[data]\ntext='stdlib'\n[log]\nevery=3\nprofile_steps=0\n")
    notes = []
    assert read_config(str(path), note=notes.append).log.every == 3
    assert notes == [f"{path}: log.profile_steps is no longer a key, and is left out"]
    with pytest.raises(UserError, match=r"unknown key log.profile_steps; did you mean log.profile\?"):
        read_config(str(path))


RUN = "out='x'\nsteps=1000\nbatch_size=1\ncompilation_cache='{}'\n[data]\ntext='stdlib'\n"


def test_only_a_flag_can_name_a_directory_of_programs(tmp_path):
    path = tmp_path / "config.toml"
    for value in ("auto", ""):
        path.write_text(RUN.format(value))
        assert parse("--config", str(path)).compilation_cache == value
    path.write_text(RUN.format("/theirs"))
    flag = ["--compilation_cache", "/mine"]
    for args in ([], flag):
        with pytest.raises(UserError, match=r'cache = ./theirs.; a file can only have "auto" or ""; .* type --comp'):
            parse("--config", str(path), *args)
    assert parse("--config", "quickstart", *flag).compilation_cache == "/mine"


def test_the_config_of_a_run_has_no_directory_of_programs(tmp_path):
    config = parse("--config", "quickstart", "--compilation_cache", "/mine", "--out", str(tmp_path))
    write_config(tmp_path, config)
    assert saved_config(config) is None
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / COMPLETE).touch()
    assert saved_config(config) == dataclasses.replace(config, compilation_cache="auto")


def test_a_run_of_a_version_that_wrote_the_directory_goes_on(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(RUN.format("/theirs"))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "2" / COMPLETE).touch()
    notes = []
    config = parse_args("train", "", ["--config", str(path)], notes.append)
    assert (config.compilation_cache, saved_config(config).compilation_cache) == ("auto", "auto")
    line = f"{path}: compilation_cache = '/theirs' is read as \"auto\"; to use the directory, type it as "
    assert notes == [line + "--compilation_cache"]
    for flag in (["--compilation_cache", "/mine"], ["--compilation-cache=/mine"]):
        assert parse_args("train", "", ["--config", str(path), *flag], notes.append).compilation_cache == "/mine"
    assert len(notes) == 1


def test_integers_are_taken_for_floats(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("out='x'\nsteps=1\nbatch_size=1\n[optimizer]\nclip_norm = 1\n")
    assert math.isclose(read_config(str(path)).optimizer.clip_norm, 1.0)
    assert isinstance(read_config(str(path)).optimizer.clip_norm, float)


def test_differences_lists_the_keys_that_change_the_mathematics():
    config = read_config("quickstart")

    def changed(**sections) -> TrainConfig:
        new = config
        for name, value in sections.items():
            old = getattr(new, name)
            value = dataclasses.replace(old, **value) if isinstance(value, dict) else value
            new = dataclasses.replace(new, **{name: value})
        return new

    same = changed(
        out="x",
        steps=9,
        compiler_options="experimental",
        model={"scan_layers": True, "remat": "full"},
        log={"every": 3},
    )
    assert differences(same, config) == {}
    other = changed(seed=3, model={"n_layer": 9}, optimizer={"beta1": 0.5})
    assert differences(other, config) == {
        "seed": (1337, 3),
        "model.n_layer": (config.model.n_layer, 9),
        "optimizer.beta1": (0.9, 0.5),
    }
