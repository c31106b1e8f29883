"""Rules that choose visual tokens, written out by hand in numpy's double precision: loops, no code of the runtime's."""

import math

import numpy as np


def cosine(a, b):
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def falling(scores):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def divprune(embeds, count):
    n = len(embeds)
    distance = [[1 - cosine(embeds[i], embeds[j]) for j in range(n)] for i in range(n)]
    second = [sorted(distance[j])[1] for j in range(n)]
    picks = [max(range(n), key=lambda j: (second[j], -j))]
    while len(picks) < count:
        best, at = None, None
        for j in range(n):
            if j not in picks:
                near = min(distance[i][j] for i in picks)
                if best is None or near > best:
                    best, at = near, j
        picks.append(at)
    return picks


def visionzip(features, keys, attention, dominant, contextual):
    """``dominant`` counts the class token; features [1 + N, C], keys [1 + N, heads, D], attention [heads, N]."""
    n = len(features) - 1
    first = sorted(falling(attention.sum(0))[: dominant - 1])
    rest = [i for i in range(n) if i not in first]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    rows = [features[0]] + [features[1 + i] for i in first]
    gathered = {t: [] for t in targets}
    metric = keys.mean(1)[1:]
    for i in rest:
        if i not in targets:
            products = [cosine(metric[i], metric[t]) for t in targets]
            gathered[targets[int(np.argmax(products))]].append(features[1 + i])
    for t in targets:
        rows.append(features[1 + t] + (np.mean(gathered[t], axis=0) if gathered[t] else 0))
    return first, targets, np.stack(rows)


def prumerge(features, query, keys, plus=False, share=None, neighbours=32):
    """Query and keys of the last layer with heads concatenated, [C] and [1 + N, C]; chosen tokens and their rows."""
    n = len(features) - 1
    x, k = features[1:], keys[1:]
    logits = np.array([query @ one for one in keys]) * len(query) ** -0.5
    a = np.exp(logits - logits.max())
    a = (a / a.sum())[1:]
    if share is None:
        low, high = np.percentile(a, 25), np.percentile(a, 75)
        share = sum(one > high + 1.5 * (high - low) for one in a) / n
    chosen = falling(a)[: int(n * share)]
    if plus:
        chosen += [i for i in range(0, n - 1, int(int(1 / share) / 3)) if i not in chosen]
    rows = []
    for i in chosen:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-cosine(k[i], k[j]), j))[:neighbours]
        rows.append(x[i] + sum(a[j] * x[j] for j in near))
    rows.append(sum(a[j] * x[j] for j in range(n) if j not in chosen))
    return chosen, np.stack(rows)


def cdpruner(embeds, question, count, weight):
    """Greedy MAP by determinants themselves."""
    n, mean = len(embeds), question.mean(0)
    r = np.array([cosine(e, mean) for e in embeds])
    r = (r - r.min() + 1e-6) / (r.max() - r.min())
    w = r if weight == 1 else np.exp(weight / (2 * (1 - weight)) * r)
    kernel = np.array(
        [[w[i] * (cosine(embeds[i], embeds[j]) if i != j else 1) * w[j] for j in range(n)] for i in range(n)]
    )
    picks = []
    while len(picks) < count:
        gains = {
            j: np.linalg.slogdet(kernel[np.ix_([*picks, j], [*picks, j])])[1]
            for j in range(n)
            if j not in picks
        }
        picks.append(max(gains, key=lambda j: (gains[j], -j)))
    return sorted(picks)


def hiprune(early, late, count, columns, alpha=0.1):
    n, chosen = len(early), []
    anchors = falling(early)[: round(count * alpha / 5)]
    for step in (0, -1, 1, -columns, columns):
        for i in anchors:
            j = min(max(i + step, 0), n - 1)
            if j not in chosen:
                chosen.append(j)
    chosen = chosen[:count]
    chosen += [i for i in falling(late) if i not in chosen][: count - len(chosen)]
    return sorted(chosen)


def vscan(early, late, embeds, count, grid):
    """Early and late attention of the class token [N]; a grid whose sides divide by 4."""
    rows, columns = grid
    local = []
    for top in range(4):
        for left in range(4):
            window = [
                y * columns + x
                for y in range(top * rows // 4, (top + 1) * rows // 4)
                for x in range(left * columns // 4, (left + 1) * columns // 4)
            ]
            local += sorted(window, key=lambda i: (-early[i], i))[: (count // 2) // 16]
    late = [0 if i in local else late[i] for i in range(len(late))]
    kept = sorted(local + falling(late)[: count - count // 2])
    gathered = {i: [embeds[i]] for i in kept}
    for j in range(len(embeds)):
        if j not in kept:
            gathered[kept[int(np.argmax([cosine(embeds[j], embeds[i]) for i in kept]))]].append(embeds[j])
    return kept, np.stack([np.mean(gathered[i], axis=0) for i in kept])


def holov(embeds, attention, count, crops=16, alpha=0.09):
    n, areas, start = len(embeds), [], 0
    for p in range(crops):
        size = n // crops + (p < n % crops)
        areas.append(list(range(start, start + size)))
        start += size
    scores = []
    for area in areas:
        values = []
        for i in area:
            row = [0 if i == j else cosine(embeds[i], embeds[j]) for j in area]
            mean = sum(row) / (len(area) - 1)
            values.append(sum((one - mean) ** 2 for one in row) / (len(area) - 1))
        a = 1000 * attention[area]
        v = np.array(values)
        scores.append(np.mean(a + alpha * v * np.mean(abs(a)) / (np.mean(abs(v)) + 1e-6)))
    weights = np.array(scores) / (sum(scores) + 1e-6)
    quotas = [math.floor(w * count) for w in weights]
    for p in falling(weights)[: count - sum(quotas)]:
        quotas[p] += 1
    kept = []
    for area, quota in zip(areas, quotas, strict=True):
        kept += area if quota >= len(area) else [area[i] for i in falling(attention[area])[:quota]]
    return kept


def vispruner(features, attention, count):
    order = falling(attention)
    kept, rest = order[: int(count * 0.5)], order[int(count * 0.5) :]
    wanted = count - len(kept)
    while len(rest) > wanted:
        first, second = rest[::2], rest[1::2]
        twin = {i: max(cosine(features[i], features[j]) for j in second) for i in first}
        by_twin = sorted(first, key=lambda i: -twin[i])
        rest = by_twin[min(8, len(rest) - wanted) :] + second
    return sorted(kept + rest)


def prunesid(features, attention, count):
    """Features [1 + N, C]; the patches in their order, the class token's row left out."""
    x, n, groups = features[1:], len(features) - 1, int(count / 4)
    matrix = 1 / (1 + np.exp(-x.T))
    values, vectors = np.linalg.eigh(np.cov(matrix, rowvar=False))
    loadings = np.abs(vectors[:, np.argsort(-values)[:groups]])
    group = [int(np.argmax(loadings[i])) for i in range(n)]
    pairs = [cosine(x[i], x[j]) for i in range(n) for j in range(i + 1, n)]
    limit = count / 32 * sum(pairs) / len(pairs)
    members = [[i for i in falling(attention) if group[i] == g] for g in range(groups)]
    left = []
    for those in members:
        alive, found = list(those), []
        while alive:
            best = alive.pop(0)
            found.append(best)
            alive = [i for i in alive if cosine(x[best], x[i]) <= limit]
        left.append(found)
    least = [min(1, len(those)) for those in members]
    most = [
        min(5 * math.ceil(count / 64), len(those), len(found))
        for those, found in zip(members, left, strict=True)
    ]
    while sum(most) < count:
        most = [min(m + 1, len(those)) for m, those in zip(most, members, strict=True)]
    others, total, before, quotas = count - 1 - sum(least), sum(map(len, left)), 0, []
    for g in range(groups):
        end = round(sum(map(len, left[: g + 1])) / total * others)
        quotas.append(min(end - before + least[g], most[g]))
        before = end
    for g in falling([len(found) for found in left]):
        quotas[g] += max(0, min(most[g] - quotas[g], count - 1 - sum(quotas)))
    chosen = []
    for those, found, quota in zip(members, left, quotas, strict=True):
        chosen += (found + [i for i in those if i not in found])[:quota]
    return chosen


def knee(similarity):
    curve = sorted(similarity, reverse=True)
    last = len(curve) - 1
    below = [curve[0] + (curve[-1] - curve[0]) * i / last - curve[i] for i in range(last + 1)]
    return sorted(falling(similarity)[: int(np.argmax(below)) + 1])
