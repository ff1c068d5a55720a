"""Who encodes which sites of a compression, and when: the layers' sites, and what of them is ours."""

from collections.abc import Mapping, Sequence

from bayou.plan import SiteRecord
from bayou.skeleton import Place
from bayou.workers import Workers

TOGETHER = 2**27
"""Weights of sites that are encoded together: their factors are in memory at once."""


def by_layer(sites: Sequence[SiteRecord], places: Mapping[str, Place], path: str) -> dict[int, list[int]]:
    """Layer -> the indexes of the sites that are encoded as it is walked; path: of the list of layers."""
    found: dict[int, list[int]] = {}
    for index, site in enumerate(sites):
        place = places.get(site.tensor)
        if site.method and place and place.path.startswith(path + "."):
            found.setdefault(int(place.path[len(path) + 1 :].split(".")[0]), []).append(index)
    return found


def heads(sites: Sequence[SiteRecord], places: Mapping[str, Place]) -> list[int]:
    """The sites of an untied head, whose input is known at the end of a walk."""
    return [i for i, site in enumerate(sites) if site.method and site.role == "head" and site.tensor in places]


def ours(sites: Sequence[SiteRecord], indexes: Sequence[int], workers: Workers, together: bool) -> list[list[int]]:
    """The groups of the sites `indexes` that this process encodes, each by one call of its method.

    together: sites of one shape, method and options are a group. A group is never divided: bytes do not depend on the
    number of processes.
    """
    groups: dict[object, list[list[int]]] = {}
    for index in indexes:
        site = sites[index]
        options = tuple(sorted((k, v) for k, v in site.options.items() if k != "rank"))
        alike = groups.setdefault((site.method, site.shape, options), [[]])
        weights = (len(alike[-1]) + 1) * site.shape[0] * site.shape[1]
        if alike[-1] and (not together or weights > TOGETHER):
            alike.append([])
        alike[-1].append(index)
    every = sorted(group for alike in groups.values() for group in alike)
    return [every[i] for i in workers.shared([cost([sites[index].shape for index in group]) for group in every])]


def cost(shapes: Sequence[tuple[int, int]]) -> float:
    """About what sites of these shapes take: decompositions, and the Hessian of their input, which goes by its
    width."""
    return sum(10.0 * min(shape) ** 3 + shape[0] * shape[1] for shape in shapes) + float(shapes[0][1]) ** 3
