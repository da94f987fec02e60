"""What every score says of a row, and every dataset value of a set, in plain words: `curate scores`, `explain` and `summary` print these.

PLAIN: score -> what a high value means for somebody who has not read the papers. FAMILIES: the file that a score stands in -> the question that
its scores answer. VALUES: a heading for the dataset values whose names begin with one of these. A test holds that every score has a line.
"""

from __future__ import annotations

FAMILIES = {
    "ranking": "Does the model find the chosen response likelier than the rejected one?",
    "flips": "What has a training run turned round?",
    "displacement": "May training push the chosen response down? By how alike the two responses look to the model",
    "squeezing": "May training push the chosen response down? By how unlikely the rejected one is already",
    "gradients": "What does one step on this row do? By its gradients",
    "forecast": "What does a step on the whole set do to this row, and this row to a target?",
    "flags": "The signs of trouble together",
    "answers": "Does the model answer it right?",
    "rates": "How often does the model answer it right, and how sure is that? For choosing prompts of RL",
    "premem": "Is it understood or memorised?",
    "limem": "Is it understood or memorised?",
    "phases": "Where does the row stand in training?",
    "trajectories": "How was the row learned over the training?",
    "cartography": "How was the row learned over the training?",
    "hardness": "How hard is the row for the model?",
}

PLAIN = {
    "ranking_gap": "By how many nats the model finds the rejected response likelier than the chosen one; above 0 it ranks the pair wrong.",
    "ranking_correct": "1: the model finds the chosen response at least as likely as the rejected one; 0: it ranks the pair wrong.",
    "ranking_correct_ln": "1: token for token the model finds the chosen response at least as likely; 0: it ranks the pair wrong.",
    "flip_loss": "High: easily ranked right; the DPO loss need not fall far for it. Near 0: training will hardly turn this pair round.",
    "break_even_agreement": "High: DPO ranks this pair right only if nearly every annotator agrees that the chosen response is better.",
    "implicit_reward_gap": "High: compared with the reference, the policy has moved towards the chosen response and away from the rejected one.",
    "flipped": "1: training turned a wrongly ranked pair right; -1: it turned a rightly ranked pair wrong; 0: nothing changed.",
    "flip_step": "High: it took training long to change how this pair is ranked.",
    "never_flipped": "1: this pair is ranked the same way at every checkpoint.",
    "ches": "High: its two responses look alike to the model, so pushing the rejected one down tends to push the chosen one down too.",
    "ches_ln": "High: its two responses look alike to the model, length set aside; pushing one down tends to push the other down too.",
    "last_state_product": "High: its two responses end alike for the model, so training has trouble telling them apart there.",
    "edit_distance": "High: its two responses share few words in the same order. Near 0: they are nearly the same text.",
    "head_displacement": "High: through the model's last layer, training on this pair pushes its chosen response down.",
    "valley_depth": "High: the model finds the rejected response very unlikely already; pushing it further feeds other words, not the chosen ones.",
    "squeezed_mass": "High: pushing the rejected response down lifts the model's own favourite word instead of the chosen response.",
    "squeezed_vocabulary": "High: pushing the rejected response down pulls most other words down with it.",
    "on_policy_gap": "High: the rejected response is unlike anything the model says itself; training against it does more harm than good.",
    "displacement_share": "High: training widens the gap by lifting the chosen response. Below 0: the chosen response falls although the gap grows.",
    "predicted_chosen_change": "High: one training step on this pair lifts its chosen response. Below 0: the step pushes it down.",
    "predicted_rejected_change": "High: one training step on this pair lifts its rejected response. Below 0: the step pushes it down, as it should.",
    "predicted_margin_gain": "High: one training step on this pair widens the gap between its two responses much.",
    "gradient_norm": "High: the chosen response moves the model's weights much.",
    "rejected_gradient_norm": "High: the rejected response moves the model's weights much.",
    "gradient_cosine": "High: the two responses pull the weights the same way, so pushing the rejected one down pushes the chosen one down too.",
    "steps_to_flip": "High: it takes many training steps on this pair before the model ranks it right.",
    "flip_cost": "High: the chosen response loses this much likelihood while training turns the pair round.",
    "grand": "High: training on this row moves the model's weights much.",
    "batch_forecast": "High: the next training step on the whole set lifts this chosen response. Below 0: the step pushes it down.",
    "margin_forecast": "High: the next training step on the whole set widens the gap between this pair's two responses.",
    "head_forecast": "High: the next training step on the whole set lifts this chosen response, as far as the model's last layer goes.",
    "displacement_contribution": "High: this pair lifts the chosen responses of the set. Below 0: it is one of those that push them down.",
    "influence": "High: training on this row makes the target's answers likelier. Below 0: it makes them unlikelier.",
    "influence_cosine": "High: training on this row moves the weights the way the target wants, whatever the row's length.",
    "influence_group": "The group of the target that this row serves best; a name, not an amount.",
    "squeezing_prone": "High: several signs say that training may push its chosen response down.",
    "squeezing_weight": "1: no sign of trouble, the row counts in full. Lower: several signs, so that it counts less.",
    "accuracy": "High: most of the model's sampled answers to it are right.",
    "target_nll": "High: the model finds the given answer unlikely.",
    "difficulty": "High: about half of the model's answers are right, so that RL can tell good from bad. Near 0: all right or all wrong.",
    "pass_rate": "High: most of the model's answers are right. RL by comparing answers learns nothing where it is 0 or 1.",
    "pass_rate_low": "High: the model answers it right at least this often, as far as the sampled answers tell.",
    "pass_rate_high": "High: the model may answer it right as often as this, as far as the sampled answers tell. Low: surely seldom.",
    "pass_at": "High: of k answers by the model, one is likely right.",
    "pass_band": "0 all wrong, 1 below the band, 2 inside, 3 above, 4 all right, 5 too few answers to tell; a name, not an amount.",
    "premem_accuracy": "High: the model answered it right before it had memorised the given solution, so it has understood it.",
    "fluent": "1: the given solution was likely from the start, so that its premem_accuracy of 0 says nothing.",
    "limem": "High: solved as it stands, but failed when the question is changed a little: memorised rather than understood.",
    "phase": "Where it stands at the last checkpoint: 0 unlearned, 1 learning, 2 learned, 3 memorised, 4 forgotten; a name, not an amount.",
    "confidence": "High: easy, the model was sure of the given answer throughout training. Low: hard, or the given answer is wrong.",
    "variability": "High: the model changed its mind about it during training; such rows often teach most.",
    "correctness": "High: answered right at most checkpoints of the training.",
    "forgetting_events": "High: learned and lost again, several times.",
    "first_learned_step": "High: learned late. 0: known before training.",
    "never_learned": "1: answered wrong at every checkpoint: too hard, or the given answer is wrong.",
    "loss_drop": "High: the run made this row much likelier. Below 0: it became unlikelier.",
    "learning_impact": "High: learned when the whole set is learned. Low: it goes its own way.",
    "map_region": "0 hard, 1 ambiguous (the model changed its mind), 2 easy; a name, not an amount.",
    "el2n": "High: the model is far from the given answer, token by token: not learned yet, or the given answer is wrong.",
    "aum": "High: learned with room to spare. Low: hard, or the given answer is wrong.",
    "ifd": "High: the question hardly helps to find the answer; above 1 it does not help at all.",
    "angle_concentration": "High: the words of the question look alike to the model; such rows are learned early and move the weights much.",
    "neighbour_excess": "High: similar rows of the training set make its answer likelier: it can be learned, and they teach it.",
}

# (heading, what the names begin with), the first that fits counts; heldout_ stands before any of them
VALUES = (
    ("How often the model ranks the chosen response first (_ln: token for token)", ("ranking_accuracy",)),
    ("What an ideal DPO policy would reach in ranking, by its β", ("idealised_ranking_accuracy",)),
    ("Pairs with signs that training may push the chosen response down (one, two or more)", ("squeezing_prone",)),
    ("What the policy has turned round, against the reference", ("flips_", "flipped_")),
    ("Answered right before it was memorised (threshold: where that begins)", ("premem",)),
    ("Rows whose given answer was likely from the start", ("fluent",)),
    ("The data map: shares of hard, ambiguous and easy rows, and how sure the model is", ("map_",)),
    ("Answers that are right, of those sampled or tested", ("accuracy", "test_accuracy")),
    (
        "Rows by how often the model answers them right (all wrong and all right: nothing for RL to compare)",
        ("pass_rate",),
    ),
    ("Rows by where their pass rate lies of the band, as surely as the samples tell", ("pass_band",)),
    ("One of so many answers is right", ("pass_at",)),
    ("How unlikely the model finds the given answers (nats a token)", ("target_nll",)),
    ("Rows in every phase of learning", ("phase_",)),
)
OTHER = "Other values"


def heading(name: str) -> str:
    """The heading that a dataset value stands under."""
    base_name = name.removeprefix("heldout_")
    return next((text for text, starts in VALUES if base_name.startswith(starts)), OTHER)
