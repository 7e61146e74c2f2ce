"""Bugs in model cards, and in what is sent to the hub."""

from parity_tests.catalogue import Row

CARD, PUBLISH, START = "data/runs/card.py", "data/publish.py", "data/runs/start.py"
IN_CARD = "data/runs/tests/test_card.py::test_"
IN_PUBLISH = "data/tests/test_publish.py::test_"

PLANTED: list[Row] = [
    (
        "card: it names the step before",
        CARD,
        'state["options"], run["config"], state["step"]',
        'state["options"], run["config"], max(0, state["step"] - 1)',
        IN_CARD + "every_checkpoint_has_one_of_its_step",
    ),
    (
        "card: losses of later steps",
        CARD,
        'rows = [row for row in metrics if row["step"] <= step]',
        "rows = list(metrics)",
        IN_CARD + "what_comes_later_is_of_later_checkpoints",
    ),
    (
        "card: a sample of a later step",
        CARD,
        "[text for at, text in samples if at == step]",
        "[text for _, text in samples]",
        IN_CARD + "what_comes_later_is_of_later_checkpoints",
    ),
    (
        "card: the best loss as that of this step",
        CARD,
        'last, best = losses[-1], min(losses, key=lambda row: row["val_loss"])',
        'last = best = min(losses, key=lambda row: row["val_loss"])',
        IN_CARD + "every_checkpoint_has_one_of_its_step",
    ),
    (
        "card: scores of another step",
        CARD,
        'if row.get("step") == step]',
        "]",
        IN_CARD + "the_certificate_and_scores",
    ),
    (
        "card: a folder here is a base model on the hub",
        START,
        'here = options.init == "random" or os.path.exists(options.init)',
        'here = options.init == "random"',
        IN_CARD + "names_of_the_hub",
    ),
    (
        "card: random weights have a base model",
        START,
        'here = options.init == "random" or os.path.exists(options.init)',
        "here = os.path.exists(options.init)",
        IN_CARD + "names_of_the_hub",
    ),
    (
        "card: every text is English",
        CARD,
        'language="en" if options["data"] in ENGLISH or is_fineweb(options["data"]) else None',
        'language="en"',
        IN_CARD + "the_front_matter_says_nothing_false",
    ),
    (
        "card: it says where things lie here",
        CARD,
        'os.path.basename(part.rstrip("/"))',
        'part.rstrip("/")',
        IN_CARD + "names_of_the_hub",
    ),
    (
        "card: one that was never checked is called equal",
        CARD,
        'return "Not checked in this run."',
        'return "**EQUAL**"',
        IN_CARD + "every_checkpoint_has_one_of_its_step",
    ),
    (
        "card: an edited one makes its checkpoint a damaged one",
        "data/checkpoints/sums.py",
        "path.name not in (SUMS, CARD, CURVE)",
        "path.name not in (SUMS, CURVE)",
        IN_CARD + "a_card_may_be_edited_or_missing",
    ),
    (
        "card: what is wrong with it costs the checkpoint",
        "data/runs/recorder.py",
        "except Exception as e:\n            Progress.write",
        "except InputError as e:\n            Progress.write",
        IN_CARD + "no_card_costs_no_checkpoint",
    ),
    (
        "publish: a dry run that uploads",
        PUBLISH,
        'this goes to {args.to}.")\n        return',
        'this goes to {args.to}.")',
        IN_PUBLISH + "a_dry_run_asks_nobody",
    ),
    (
        "publish: what only training needs is sent too",
        PUBLISH,
        "if path.name in SENT or SHARD.fullmatch(path.name)]",
        "if path.name != CARD]",
        IN_PUBLISH + "what_is_sent",
    ),
    (
        "publish: a private model for everybody",
        PUBLISH,
        "private=args.private, exist_ok=True",
        "exist_ok=True",
        IN_PUBLISH + "what_is_sent",
    ),
    (
        "publish: --private into a public repository",
        PUBLISH,
        "if private and not info.private:",
        "if private and info.private is None:",
        IN_PUBLISH + "what_the_hub_refuses",
    ),
    (
        "publish: over the files of another model",
        PUBLISH,
        "    if others:\n",
        "    if len(others) > 99:\n",
        IN_PUBLISH + "what_the_hub_refuses",
    ),
    (
        "publish: a licence that nobody gave",
        PUBLISH,
        '    if license:\n        card.data["license"] = license',
        '    if True:\n        card.data["license"] = license or "mit"',
        IN_PUBLISH + "a_checkpoint_with_a_card_and_scores",
    ),
    (
        "publish: the card of the run in place of its own",
        PUBLISH,
        'written.read_text(encoding="utf-8") if written.is_file() else card_of(folder)',
        "card_of(folder)",
        IN_PUBLISH + "a_checkpoint_with_a_card_and_scores",
    ),
    (
        "publish: a damaged checkpoint is sent",
        PUBLISH,
        "config, _ = load(folder)  #",
        "config, _ = __import__('data.checkpoints.checkpoint', fromlist=['']).read_model(folder)  #",
        IN_PUBLISH + "what_is_refused_before_the_hub_is_asked",
    ),
    (
        "publish: the hub is asked without a token",
        PUBLISH,
        "    if not get_token():",
        "    if False:",
        IN_PUBLISH + "what_is_refused_before_the_hub_is_asked",
    ),
]
