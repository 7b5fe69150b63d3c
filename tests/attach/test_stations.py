"""One stand-in for each patched method, whoever comes and goes in whatever order."""

import copy
import itertools
import pickle

import pytest

from lightning_speedups.attach.stations import Station


class Owner:
    def method(self, word="its own"):
        return word


class Member:
    """Puts its name around what comes out."""

    def __init__(self, name):
        self.name = name

    def act(self, method, *args, **kwargs):
        return f"{self.name}({method(*args, **kwargs)})"


def join(owner, who, order=0):
    Station.of(owner, "method").join(who, who.act, order)


def leave(owner, who):
    Station.of(owner, "method").leave(who)


def test_the_last_one_out_gives_back_the_method_of_the_class():
    owner, who = Owner(), Member("a")
    join(owner, who)
    assert owner.method() == "a(its own)"
    assert owner.method(word="given") == "a(given)"
    leave(owner, who)
    assert owner.method() == "its own"
    assert vars(owner) == {}
    pickle.dumps(owner)


def test_it_gives_back_a_method_that_someone_else_had_put_there():
    owner, who = Owner(), Member("a")
    theirs = owner.method = lambda: "theirs"
    join(owner, who)
    assert owner.method() == "a(theirs)"
    leave(owner, who)
    assert owner.method is theirs


def test_a_method_of_the_base_class_leaves_nothing():
    class Heir(Owner):
        pass

    owner, who = Heir(), Member("a")
    join(owner, who)
    leave(owner, who)
    assert vars(owner) == {}


@pytest.mark.parametrize("out", list(itertools.permutations("abc")))
def test_members_come_and_go_in_any_order_and_stand_by_their_numbers(out):
    owner, members = Owner(), {name: Member(name) for name in "abc"}
    for name, order in (("b", 1), ("c", 1), ("a", 0)):
        join(owner, members[name], order)
    assert owner.method() == "c(b(a(its own)))"
    station = Station.of(owner, "method")
    for gone, name in enumerate(out):
        leave(owner, members[name])
        left = [one for one in "abc" if one not in out[: gone + 1]]
        expected = "its own"
        for one in left:
            expected = f"{one}({expected})"
        assert owner.method() == expected
        assert (vars(owner).get("method") is station) == bool(left)


def test_joining_twice_is_joining_once_and_a_stranger_leaves_without_a_trace():
    owner, who = Owner(), Member("a")
    join(owner, who)
    join(owner, who)
    leave(owner, Member("b"))
    assert owner.method() == "a(its own)"
    leave(owner, who)
    leave(owner, who)
    assert vars(owner) == {}


def test_what_someone_has_put_on_top_stays_and_goes_on_working():
    owner, who = Owner(), Member("a")
    join(owner, who)
    below = owner.method
    owner.method = lambda: f"theirs({below()})"
    assert owner.method() == "theirs(a(its own))"
    below.leave(who)
    assert owner.method() == "theirs(its own)"


def test_a_member_is_found_by_its_kind():
    owner, who = Owner(), Member("a")
    assert Station.of(owner, "method").find(Member) is None
    join(owner, who)
    assert Station.of(owner, "method").find(Member) is who
    assert Station.of(owner, "method").find(int) is None


@pytest.mark.parametrize("way", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_of_the_owner_calls_its_own_method(way):
    owner = Named("one")
    join(owner, Member("a"))
    assert owner.method() == "a(one)"
    twin = way(owner)
    twin.name = "other"
    assert (twin.method(), owner.method()) == ("a(other)", "a(one)")


class Named:
    def __init__(self, name):
        self.name = name

    def method(self):
        return self.name
