"""Command lines that are refused: exit code 2 and one line that names key, value and remedy. And nothing is started."""

from pathlib import Path

import pytest

from megapar.cli import main
from tests.data.texts import make_text

# command line -> words that the one line must hold, in this order
REFUSED = {
    # keys and files
    "train train.stepz=3": ["train.stepz=3", "unknown key", "did you mean train.steps?"],
    "train lr=3": ["lr=3", "did you mean optim.lr?"],
    "train +a.b=1": ["a.b=1", "unknown key", "--info config"],
    "train +train.stepz=1": ["train.stepz=1", "did you mean train.steps?"],
    "train ++x=1": ["x=1", "unknown key"],
    "train +optim.lr=1": ["optim.lr", "leave out the +"],
    "train ~optim": ["~optim", "leave it out"],
    "train ~optim.lr": ["~optim.lr", "leave it out"],
    "train modle=tiny": ["modle=tiny", "did you mean model?"],
    "train parallel=tpp9": ["parallel=tpp9", "no such file", "tp2pp2dp2"],
    "train parallel=tp9": ["model.heads=4", "parallel.tp=9"],
    "train experiment=demoo": ["experiment=demoo", "did you mean demo?"],
    "train prompt=x": ["prompt=x", "unknown key"],
    "generate model=tiny": ["model=tiny", "generate", "parallel"],
    "train model@x=tiny": ["model@x=tiny", "model=FILE"],
    "train hydra.job.name=x": ["hydra.job.name=x", "-m"],
    "train optim.learning_rate=1": ["optim.learning_rate=1", "did you mean optim.lr?"],
    "train batch_size=1": ["batch_size=1", "did you mean train.global_batch_size?"],
    "train train.global_batch_size=4000000000": ["global_batch_size=4000000000", "micro-batches", "micro_batch_size"],
    "train model=/no/where": ["model=/no/where", "no such folder", "Hugging Face folder"],
    "train model=bert_base": ["model.causal=false", "task.name=lm"],
    "train model.output=mlm": ["model.output=mlm", "task.name=lm"],
    "train model.window_pattern=WX": ["window_pattern=WX", "W (window) and F (full)"],
    "train model.rope_scaling.kind=llama3": ["rope_scaling.original_length=null", "llama3"],
    "train model.norm_offset=true model.norm=layernorm": ["norm_offset=true", "rmsnorm"],
    "import run.dir=x": ["hf=null", "hf=DIR"],
    "import hf=/no/where run.dir=x": ["/no/where/config.json", "missing"],
    "export run.dir=/no/where hf=x": ["/no/where/config.yaml", "no such file"],
    "train model.num_layers=1": ["model.num_layers=1", "did you mean model.layers?"],
    "train tensor_parallel=2": ["tensor_parallel=2", "did you mean parallel.tp?"],
    "generate replicas=1": ["replicas=1", "unknown key", "--info config"],
    # grammar
    "train train.steps": ["train.steps", "key=value"],
    "train train.steps=[": ["train.steps=[", "key=value", "quotes"],
    "train optim.lr=1e-3,3e-3": ["optim.lr=1e-3,3e-3", "-m"],
    "train --fast": ["--fast", "--help"],
    "train train.steps=${nothing}": ["nothing"],
    "train run.dir=": ["run.dir", "empty"],
    "trian": ["trian", "did you mean train?"],
    "verify -m layouts=[tp2]": ["-m", "verify"],
    "train --info=all": ["--info=all", "--info config"],
    # types
    "train train.steps=ten": ["train.steps=ten", "an integer"],
    "train train.steps=1.5": ["train.steps=1.5", "an integer"],
    "train train.steps=true": ["train.steps=true", "an integer"],
    "train optim.lr=fast": ["optim.lr=fast", "number"],
    "train optim.lr=nan": ["optim.lr=nan", "finite"],
    "train model.bias=1": ["model.bias=1", "true or false"],
    "train train.dtype=fp16": ["train.dtype=fp16", "fp64, fp32, bf16"],
    "train parallel.tp=2 parallel.tp_overlap=fused": ["tp_overlap=fused", "auto, serial, chunked, symmetric"],
    "train parallel.tp=2 parallel.tp_overlap=symmetric": ["tp_overlap=symmetric", "kernels.backend=interpret"],
    "train parallel.tp=2 parallel.tp_overlap=symmetric kernels.backend=torch": ["tp_overlap=symmetric", "interpret"],
    "train parallel.zero=2": ["parallel.zero=2", "0, 1"],
    "train parallel.zero=true": ["parallel.zero=true", "0, 1"],
    "train pipeline.schedule=dualpipe": ["pipeline.schedule=dualpipe", "did you mean dualpipe_v?"],
    "train pipeline.schedule=csv:": ["pipeline.schedule=csv:", "no such schedule", "1f1b"],
    "train pipeline.schedule=csv:/no/where.csv": ["pipeline.schedule=csv:/no/where.csv", "No such file"],
    "train parallel.pp=2 pipeline.costs=/no/where.json": ["pipeline.costs=/no/where.json", "No such file"],
    "train parallel.pp=2 pipeline.speed=[1,2]": ["pipeline.speed=[1.0,2.0]", "has no effect here", "balanced"],
    "train parallel.pp=2 pipeline.partition=balanced pipeline.speed=[1]": ["pipeline.speed=[1.0]", "2 numbers"],
    "train parallel.pp=2 pipeline.memory_limit=2": ["pipeline.memory_limit=2", "pipeline.schedule=auto"],
    "train parallel.pp=2 pipeline.schedule=auto pipeline.memory_limit=0.5": ["memory_limit=0.5", "one micro-batch"],
    "verify layouts=[pp2] pipeline.costs=/no/where.json": ["pipeline.costs=/no/where.json", "No such file"],
    "verify layouts=[pp2] pipeline.rebalance=5": ["pipeline.rebalance=5", "leave it out"],
    "schedule microbatches=1000000": ["microbatches=1000000", "at most 65536"],
    "schedule microbatches=65536 stages=64": ["microbatches=65536", "too many to compare"],
    "train pipeline.schedule=zbv pipeline.chunks=3": ["pipeline.chunks=3", "2 stages per rank; use 2"],
    "train parallel.pp=4 pipeline.schedule=zbv": ["parallel.pp=4", "pipeline.chunks=2", "at most 2"],
    "train parallel.pp=2 pipeline.schedule=dualpipe_v train.global_batch_size=4": [
        "pipeline.schedule=dualpipe_v",
        "micro-batches",
    ],
    "train parallel.pp=2 pipeline.schedule=interleaved pipeline.partition=[2,2]": ["pipeline.partition", "4 numbers"],
    "schedule pipeline.schedule=1f2b": ["pipeline.schedule=1f2b", "did you mean 1f1b?"],
    "schedule chunks=2 pipeline.schedule=1f1b": ["chunks=2", "use 1"],
    "schedule csv=x.csv": ["csv=x.csv", "pipeline.schedule=NAME"],
    "schedule pipeline.schedule=zbv plot=x.png": ["plot=x.png", ".svg or .html"],
    "schedule pipeline.schedule=dualpipe_v microbatches=4": ["pipeline.schedule=dualpipe_v", "at least 2 * 8"],
    "schedule costs.F=0": ["costs.F=0", "more than 0"],
    "schedule costs.file=/no/where.json": ["costs.file=/no/where.json", "No such file"],
    "schedule out=/no/where/x.json": ["out=/no/where/x.json", "folder"],
    "schedule pipeline.schedule=auto memory_limit=0.5": ["memory_limit=0.5", "one micro-batch"],
    "train pipeline.partition=[2,a]": ["pipeline.partition=[2,a]", "list such as [5,3]"],
    "train model.layers=null": ["model.layers=null", "an integer"],
    "train train=5": ["train=5", "no such file", "default"],
    # ranges
    "train train.steps=0": ["train.steps=0", "at least 1"],
    "train optim.lr=0": ["optim.lr=0", "more than 0"],
    "train train.seed=-1": ["train.seed=-1", "at least 0"],
    "train train.seed=9223372036854775808": ["train.seed=9223372036854775808", "at most 9223372036854775807"],
    "generate run.dir=x prompt=x sample.seed=9223372036854775808": ["sample.seed=", "at most"],
    "train train.timeout_s=1e300": ["train.timeout_s=1e+300", "at most 2592000"],
    "train train.timeout_s=0": ["train.timeout_s=0", "at least 1"],
    "train model.init_std=1e39": ["model.init_std=1e+39", "at most 1000"],
    f"train optim.lr=1{'0' * 400}": ["optim.lr=1000", "finite"],
    "train logger.wandb.project=a/b": ["logger.wandb.project=a/b", "none of /"],
    "train optim.clip_grad=-1": ["optim.clip_grad=-1", "at least 0"],
    "train model.dropout=1.0": ["model.dropout=1.0", "less than 1"],
    "train data.split=1.0": ["data.split=1.0", "less than 1"],
    "train model.attention_dropout=0.1": ["model.attention_dropout=0.1", "model.dropout"],
    "train optim.name=sgd": ["optim.name=sgd", "no such update rule", "adamw, lion, muon"],
    "train optim=sgd": ["optim=sgd", "no such file", "adamw, lion, muon"],
    "train optim.lr_scheduler_type=linear": ["lr_scheduler_type=linear", "did you mean optim.schedule?"],
    "train optim.schedule=cosin": ["optim.schedule=cosin", "cosine, wsd, linear, constant"],
    "train optim.decay_steps=5": ["optim.decay_steps=5", "has no effect here", "optim.schedule=wsd"],
    "train model.lora.alpha=32": ["model.lora.alpha=32", "has no effect here", "model.lora.rank above 0"],
    "train model.lora.targets=[q]": ["model.lora.targets=[q]", "has no effect here"],
    "train model.lora.rank=2 model.lora.targets=[q,q]": ["model.lora.targets=[q,q]", "q twice"],
    "train model.lora.rank=2": ["model.lora.base=null", "beside random weights", "checkpoint.weights=RUN"],
    "train model.lora.rank=2 model.lora.base=/no/where": ["model.lora.base=/no/where", "no such folder"],
    "train task.beta=0.2": ["task.beta=0.2", "has no effect here", "task=dpo"],
    "train task.mask_share=0.5": ["task.mask_share=0.5", "has no effect here", "task=masked_lm"],
    "train task=classify data.path=x.jsonl model.causal=true model.pooling=first": [
        "model.pooling=first",
        "last or mean",
    ],
    "train task=dpo data.path=x.jsonl task.reference=/no/where": ["task.reference=/no/where", "no such folder"],
    "train experiment=classify_language task=masked_lm": ["data.path=labels", "makes labelled", "reads tokens"],
    "train experiment=classify_language data.path=strings": ["data.path=strings", "makes tokens", "reads labelled"],
    "train optim.schedule=wsd optim.warmup_steps=95 optim.decay_steps=6": ["optim.decay_steps=6", "more than the 5"],
    'train optim.groups={"embeding":{}}': ["optim.groups=embeding", "no part", "embedding, layers.0 to layers.3, head"],
    'train optim.groups={"head":{"lr":1}}': ["optim.groups.head.lr=1", "unknown key", "lr_scale, weight_decay"],
    'train optim.groups={"head":{"lr_scale":-1}}': ["optim.groups.head.lr_scale=-1", "at least 0"],
    'train optim.groups={"head":{"lr_scale":"a"}}': ["optim.groups.head.lr_scale=a", "a finite number"],
    'train optim.groups={"head":5}': ["optim.groups={head: 5}", "expects NAME", "lr_scale, weight_decay"],
    "train optim.groups=[1]": ["optim.groups=[1]", "expects NAME", "lr_scale, weight_decay"],
    "train optim.groups={a": ["optim.groups={a", "not readable"],
    "train optim.warmup_steps=101": ["optim.warmup_steps=101", "train.steps=100"],
    "train train.eval_every=5 data.split=0": ["train.eval_every=5", "data.split=0"],
    "train train.trace=[3]": ["train.trace=[3]", "the first and the last step", "train.steps=100", "[99,100]"],
    "train train.trace=[]": ["train.trace=[]", "the first and the last step"],
    "train train.trace=[0,3]": ["train.trace=[0,3]", "within 1 to train.steps=100"],
    "train train.trace=[99,101]": ["train.trace=[99,101]", "within 1 to train.steps=100"],
    "train train.trace=[5,4]": ["train.trace=[5,4]", "first and the last"],
    "train train.steps=1 train.trace=[2,2]": ["train.trace=[2,2]", "within 1 to train.steps=1,", "[1,1]"],
    "train train.trace=7": ["train.trace=7", "a list such as [5,3]"],
    "train data=text": ["data.path=", "folder"],
    "train model.module=": ["model.module=", "empty", "leave it out"],
    "train model.module=json": ["model.module=json", "use PACKAGE:FUNCTION", "my_model:build_stage"],
    "train model.module=no_such.model:build": [
        "model.module=no_such.model:build",
        "can't be imported",
        "No module named",
    ],
    "train model.module=json:build": ["model.module=json:build", "json has no build"],
    "verify model.module=json:nothing": ["model.module=json:nothing", "json has no nothing"],
    "verify model.module=json:__name__": ["model.module=json:__name__", "a str can't be called"],
    "verify model.module=a-b:c": ["model.module=a-b:c", "use PACKAGE:FUNCTION"],
    # layouts
    "train parallel.tp=3": ["model.heads=4", "parallel.tp=3", "use 3 or 6"],
    "train parallel.tp=4 model.ffn=90": ["model.ffn=90", "parallel.tp=4", "use 88 or 92"],
    "train parallel.tp=2 model.heads=6 model.hidden=96 model.kv_heads=3": ["model.kv_heads=3", "parallel.tp=2", "1, 3"],
    "train model.kv_heads=3": ["model.kv_heads=3", "model.heads=4", "1, 2, 4"],
    "train model.hidden=130": ["model.hidden=130", "model.heads=4", "model.head_dim"],
    "train model.head_dim=5": ["model.head_dim=5", "even"],
    "train parallel.pp=5": ["parallel.pp=5", "model.layers=4", "at most 4"],
    "train parallel.dp=3": ["train.global_batch_size=16", "4 * 3 = 12", "use 12 or 24"],
    "train parallel.tp=2 parallel.sequence_parallel=true train.seq_length=5 train.micro_batch_size=1": [
        "parallel.sequence_parallel=true",
        "5 is not divisible",
    ],
    "train parallel.pp=2 pipeline.partition=[3,2]": ["pipeline.partition=[3,2]", "model.layers=4"],
    "train parallel.pp=3 pipeline.partition=[2,0,2]": ["pipeline.partition=[2,0,2]", "only the ends may be 0"],
    "train parallel.pp=2 pipeline.partition=[4]": ["pipeline.partition=[4]", "2 numbers"],
    "train parallel.pp=2 pipeline.partition=even": ["pipeline.partition=even", "uniform"],
    "train pipeline.chunks=2": ["pipeline.chunks=2", "use 1"],
    "train parallel=tp2 devices=4 parallel.dp=1": ["devices=4", "tp2", "parallel=auto"],
    "train parallel=auto devices=7": ["parallel.auto=true", "7 ranks", "devices=6"],
    "train parallel=auto devices=8 parallel.tp=2": ["parallel.auto=true", "leave them out"],
    "verify layouts=[tp2,tp9x]": ["layouts=tp9x", "tp2pp2dp2"],
    "verify layouts=[tp5]": ["layouts=tp5", "model.heads=", "parallel.tp=5"],
    "verify train.dtype=bf16": ["train.dtype=bf16", "fp64"],
    "verify layouts=[]": ["layouts=[]", "tp2"],
    "verify layouts=[tp2] pipeline.partition=[3,1]": ["pipeline.partition=[3,1]", "2 stages", "uniform"],
    "verify layouts=[pp2] pipeline.partition=[3,9]": ["layouts=pp2", "pipeline.partition=[3,9]", "add up"],
    "verify pipeline.partition=even": ["pipeline.partition=even", "uniform"],
    # machine and data
    "train kernels.backend=triton": ["kernels.backend=triton", "use torch"],
    "train kernels.backend=interpret train.dtype=fp64": ["kernels.backend=interpret", "fp32", "or torch"],
    "verify kernels.backend=interpret": ["kernels.backend=interpret", "fp32", "or torch"],
    "kernels targets=[sm_90,sm_99]": ["targets=sm_99", "unknown", "sm_100"],
    "kernels kernel=[atention]": ["kernel=atention", "unknown", "attention"],
    "kernels kernel=[]": ["kernel=[]", "nothing to do", "attention"],
    "kernels specs=/nodir/x.json": ["specs=/nodir/x.json", "no such folder"],
    "bench": ["bench: say what to bench: kernels"],
    "bench kernel=[attention]": ["bench kernel=[attention]", "say what to bench: kernels"],
    "bench kernels kernel=[atention]": ["kernel=atention", "unknown", "attention"],
    "bench kernels kernel=[]": ["kernel=[]", "nothing to do", "attention"],
    "bench kernels kernels=[attention]": ["kernels=[attention]", "group of keys", "kernels.backend"],
    "bench kernels provider=[megapar,cudnn]": ["provider=cudnn", "unknown", "flash_attn"],
    "bench kernels mode=[sideways]": ["mode=sideways", "unknown", "forward"],
    "bench kernels mode=[]": ["mode=[]", "forward"],
    "bench kernels shape=[llama]": ["shape=llama", "unknown", "llama-8b"],
    "bench kernels tokens=[0,8]": ["tokens=[0,8]", "at least 1"],
    "bench kernels targets=[sm_99]": ["targets=sm_99", "unknown", "sm_90"],
    "bench kernels kernels.backend=torch": ["kernels.backend=torch", "provider=[torch]"],
    "bench kernels kernels.backend=triton": ["kernels.backend=triton", "need a GPU"],
    "train kernels.backend=interpret train.device=cuda": [
        "kernels.backend=interpret",
        "on a CPU, not on cuda",
        "use cpu",
    ],
    "verify kernels.backend=interpret train.device=cuda": ["kernels.backend=interpret", "fp32"],
    "verify train.device=cuda": ["train.device=cuda", "no GPU is visible", "use cpu"],
    "bench kernels device=cuda": ["device=cuda", "no GPU is visible", "use cpu"],
    "bench kernels out=/dev/null/x": ["out=/dev/null/x", "can't be written", "another folder"],
    "bench kernels out=/proc/x": ["out=/proc/x", "can't be written", "another folder"],
    "train data.path=/does/not/exist": ["/does/not/exist"],
    "data data.path=/does/not/exist": ["/does/not/exist"],
    "train run.dir=/dev/null/run CORPUS": ["run.dir=/dev/null/run", "another folder"],
    "train model.vocab_size=100 CORPUS": ["model.vocab_size=100", "400"],
    "train train.seq_length=100000 train.micro_batch_size=1 train.recompute=selective CORPUS": [
        "train.seq_length=100000",
        "needs 100001 tokens",
    ],
    "train task.sample_tokens=2 task.sample_prompt=a\udcffb CORPUS": ["task.sample_prompt='a\\udcffb'", "character 1"],
    "train task.sample_tokens=5 model.vocab_size=61 data.path=TOKENS": ["task.sample_tokens=5", "without a tokenizer"],
    "train data.path=ONE_FILE train.eval_every=1 data.vocab_size=300": ["data.split=0.05", "none can be held out"],
    "train out=/nodir/x.json": ["out=/nodir/x.json", "no such folder"],
    "verify out=/nodir/x.json": ["out=/nodir/x.json", "no such folder"],
    "train out=/": ["out=/", "is a folder"],
    "verify checkpoint.load=x": ["checkpoint.load=x", "initial values"],
    "verify checkpoint.weights=x": ["checkpoint.weights=x", "initial values"],
    "train checkpoint.load=/nodir CORPUS": ["checkpoint.load=/nodir", "no such folder"],
    "train checkpoint.load=/dev CORPUS": ["checkpoint.load=/dev", "holds no checkpoint"],
    "train logger.wandb.mode=online": ["logger.wandb.mode=online", "no key", "wandb login", "offline"],
    "generate prompt=x": ["run.dir", "run.dir=RUN"],
    "generate run.dir=/does/not/exist prompt=x": ["/does/not/exist/config.yaml", "no such file"],
    # a folder in place of a key
    "generate /does/not/exist prompt=x": ["/does/not/exist/config.yaml", "no such file"],
    # far too large, by an estimate, before anything is built
    "train model.layers=1000000000": ["model.layers=1000000000", "needs at least", "GB of this machine", "use more"],
    "train model.hidden=100000000": ["model.hidden=100000000", "needs at least"],
    "train train.seq_length=600000 parallel=pp2": ["train.seq_length=600000", "needs at least"],
    "verify model.layers=1000000": ["model.layers=1000000", "needs at least"],
    "train -m model.layers=2,1000000": ["model.layers=1000000", "needs at least", "in the point"],
    "generate one two prompt=x": ["two: ", "one folder", "one was given before it"],
    "generate one run.dir=two prompt=x": ["run.dir=two: one before it is short for run.dir=one", "give one"],
    "generate prompt=x one": ["one: not an override; write key=value"],
    "train one": ["one: not an override; write key=value"],
    "schedule one": ["one: not an override; write key=value"],
    # sweeps
    "train -m parallel=tp2,tp8": ["model.heads=4", "parallel.tp=8", "in the point parallel=tp8"],
    "train -m parallel=tp2,tpp9": ["parallel=tpp9", "no such file"],
    "train -m train.stepz=1,2": ["train.stepz=1,2", "did you mean train.steps?"],
    "train -m train.steps=1,2 out=x": ["out=x", "leave it out"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(
    line: str,
    capsys: pytest.CaptureFixture[str],
    corpus: list[str],
    tokens: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    texts = tmp_path_factory.mktemp("texts")
    (texts / "one.txt").write_text("".join(make_text(seed) for seed in range(4)), encoding="utf-8")
    places = {"ONE_FILE": f"{texts / 'one.txt'} data.cache={texts}", "TOKENS": tokens}
    text = line
    for name, place in places.items():
        text = text.replace(name, place)
    arguments = [word for part in text.split() for word in (corpus if part == "CORPUS" else [part])]
    assert main(arguments, entry="stubs:must_not_run") == 2
    shown = capsys.readouterr()
    said = [text for text in shown.err.splitlines() if not text.startswith("data: ")]
    assert len(said) == 1, shown.err
    position = 0
    for words in REFUSED[line]:
        assert words in said[0][position:], f"{words!r} is not in {said[0]!r} where expected"
        position = said[0].index(words, position)
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []  # no run directory for a refused run


def test_cuda_without_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "train.device=cuda"]) == 2
    assert "train.device=cuda: no GPU is visible; use cpu" in capsys.readouterr().err
