"""Runners of the reference cases of the text path: tokenizer, Gemma, projection, connectors."""

import torch
from golden_support import Case, Outputs
from torch import Tensor

from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.networks import Networks


def run_tokenizer(case: Case) -> Outputs:
    tokenizer = case.networks().tokenizer()
    outputs: Outputs = {}
    for name, expected in case.expected.items():
        length = expected.shape[1]
        rows = [
            tokenizer.left_padded(tokenizer.encode(prompt, length).ids, length)
            for prompt in case.params["prompts"]
        ]
        kind = 0 if name.startswith("input_ids") else 1
        assert name.startswith(("input_ids", "attention_mask")), name
        outputs[name] = torch.stack([row[kind] for row in rows])
    return outputs


def _states(networks: Networks, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (L, S, D) of one padded prompt; padding rows stay zero."""
    real = mask.bool()
    first = len(ids) - int(real.sum())
    found = list(networks.gemma().states(ids[real][None], first))
    out = torch.zeros(len(found), len(ids), found[0].shape[-1])
    out[:, real] = torch.cat(found)
    return out


def run_gemma_hidden_states(case: Case) -> Outputs:
    ids, mask = case.given("input_ids"), case.given("attention_mask")
    networks = case.networks()
    states = torch.stack([_states(networks, *row) for row in zip(ids, mask, strict=True)])
    first, last = case.params["positions"]
    tail = states[:, :, first:last]
    where = mask[:, None, first:last].bool().expand(tail.shape[:3])
    return {"hidden_states_tail": tail, "where": where}


def run_connectors(case: Case) -> Outputs:
    states, mask = case.given("hidden_states"), case.given("attention_mask")
    encoder = GemmaConfig(hidden=states.shape[3], layers=states.shape[1] - 1)
    networks = case.networks()
    projection = networks.text_projection(encoder)
    features = dict(zip(("video", "audio"), projection.padded_features(states, mask), strict=True))
    connectors = {"video": networks.video_connector(), "audio": networks.audio_connector()}
    outputs: Outputs = {"out_mask": torch.ones_like(mask)}
    for stream, feature in features.items():
        outputs[f"{stream}_features"] = feature
        outputs[f"{stream}_encoding"] = torch.cat(
            [
                connectors[stream](rows[real.bool()][None], mask.shape[1])
                for rows, real in zip(feature, mask, strict=True)
            ]
        )
    return outputs


def run_text_full_path(case: Case) -> Outputs:
    networks = case.networks(case.params["gemma"])
    ids, mask = case.given("input_ids"), case.given("attention_mask")
    length = ids.shape[1]
    gemma, projection = networks.gemma(), networks.text_projection()
    connectors = (networks.video_connector(), networks.audio_connector())
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for prompt, row, real in zip(case.params["prompts"], ids, mask, strict=True):
        encoded = networks.tokenizer().encode(prompt, length).ids
        assert list(encoded) == row[real.bool()].tolist(), "the case's ids are the prompt's"
        states = gemma.states(torch.tensor([encoded]), length - len(encoded))
        features = projection.features(states)
        for out, connector, feature in zip(rows, connectors, features, strict=True):
            out.append(connector(feature, length)[0])
    positions = case.tensors["positions"]
    video, audio = (torch.stack(out)[:, positions] for out in rows)
    return {"positions": positions, "video_encoding": video, "audio_encoding": audio}


TEXT_KINDS = {
    "tokenizer": run_tokenizer,
    "gemma_hidden_states": run_gemma_hidden_states,
    "connectors": run_connectors,
    "text_full_path": run_text_full_path,
}
