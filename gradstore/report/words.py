"""What a page says in words, for someone who knows neither language models nor this program."""

STEPS = (0.1, 0.5, 1.5, 3.0, 5.0)  # nats: where the shades of the heat map begin

ROLES = {
    "forget": "forgotten",
    "neighbour": "neighbour",
    "retained": "retained",
    "holdout": "held-out",
    "general": "general text",
}

EVALUATED = {"neighbour": "nearest"}  # where an evaluation means others than a request by a role

VERDICTS = {
    "forgotten": "What was asked for was done.",
    "partly": "It was begun, but stopped short.",
    "refused": "Nothing was changed.",
}

DIRECTIONS = {
    "applied": "take back what is left of the training steps that these records caused",
    "newton": "the same, weighed by how sensitive the records that stay are",
    "orthogonal": "the same, without the part shared with records that stay",
    "raw": "climb the loss along the gradients stored in the first epoch",
    "fresh": "climb the loss along the gradient at the model as it is (made to compare with)",
    "random": "random noise in the records' rows (made to compare with)",
    "graddiff": "training steps up their loss and down that of what stays (made to compare with)",
    "npo": "the same, of which each pulls less the further it came (made to compare with)",
    "exact": "train again from the start, with these records left out",
}

SOURCES = {
    "asked": "the loss that was asked for",
    "undo": "estimated by undoing the optimizer's steps",
    "held-out": "estimated from records that were never trained on",
}

METRICS = {
    "loss": "mean surprise, nats per token; higher: less known",
    "probability": "typical probability given to each token, 0 to 1",
    "mean_probability": "the same, averaged over tokens instead",
    "perplexity": "how many tokens the model wavers between, as many as e to the loss",
    "exact_memorization": "share of tokens that the model would guess first",
    "extraction_strength": "share of the text recited once its beginning is given",
    "min_k": "mean log-probability of the least likely tokens; higher: better known",
    "min_k_plus_plus": "the same, against what else the model thought likely",
    "zlib_ratio": "loss per byte of the compressed text",
    "rouge_l_recall": "overlap of the model's continuation with the true one, 0 to 1",
    "extracted": "share of secrets that the model says when asked",
    "extracted_beam": "share of secrets that beam search finds",
    "exposure": "bits by which the true secret is likelier than random ones of its form",
    "gradnorm": "how far the record would still move the embedding",
    "loss_above_reference": "loss beyond that of the model that never saw it",
    "kl_to_reference": "distance of predictions to the model that never saw them, nats per token",
    "auc_loss": "how well loss tells forgotten from held-out: 0.5 not, 1 known, 0 stands out",
    "auc_zlib_ratio": "the same by loss per compressed byte",
    "auc_min_k": "the same by the least likely tokens",
    "auc_min_k_plus_plus": "the same by these against the model's other thoughts",
    "auc_gradnorm": "the same by how far they would move the embedding",
    "auc_loss_above_reference": "the same by loss beyond the reference's",
    "tpr_at_1_fpr_loss": "share of the forgotten found out at one false alarm in a hundred",
    "klom": "how far many such models are from many that never saw it; 0: alike",
    "lira": "chance that a model was trained with it, as many with and without tell",
    "u_lira": "how often forgotten can be told from never seen; 0.5 is ideal",
    "privleak_min_k": "how much more membership shows than with the reference; 0 is ideal",
    "ks_loss": "largest gap between its distribution of losses and the reference's",
    "ks_loss_p": "how likely such a gap is by chance",
    "ks_probability": "the same gap between probabilities",
    "ks_probability_p": "how likely such a gap is by chance",
    "loss_bf16": "loss after rounding the weights to 16 bits",
    "loss_int8": "loss after rounding the weights to 8 bits",
    "exact_memorization_bf16": "share guessed first, after rounding to 16 bits",
    "exact_memorization_int8": "share guessed first, after rounding to 8 bits",
}

CHECKS = {
    "membership": "Do the forgotten look like records that were never trained on?",
    "nearer": "Is the model nearer to one that never saw them than to the one before?",
    "relearning": "Does teaching a little of it bring the rest back too fast?",
    "rounding": "Does forgetting survive rounding of the weights?",
    "extraction": "Does the model say secrets that the other one would not?",
}

SEGMENTS = {
    "gradients": "one gradient per record and captured epoch",
    "moments": "the optimizer's state, needed to know the steps it took",
    "holdout": "tokens of the records held out",
    "order": "the order of the training data",
}


def role(name: str) -> str:
    """A role in words; one of a later release stands for itself."""
    return ROLES.get(name, name)


def place(role: str) -> tuple[int, str]:
    """Where a role stands among others: the known ones in their order, then the rest by name."""
    known = list(ROLES)
    return (known.index(role) if role in known else len(known), role)
