"""Guards of what is on the disk: the groups' bytes beside the journal."""

from tests.mutations.guard import Guard

GROUP_FILES = "learner/coordinator/test_group_files.py::"
TESTS = "learner/coordinator/test_journal.py::"

JOURNAL = (
    Guard(
        missing="bytes are said to be on the disk that are on their way",
        file="learner/coordinator/group_files.py",
        code="        os.fdatasync(self._descriptor)\n",
        broken="",
        test=f"{GROUP_FILES}test_groups_are_on_the_disk_when_append_returns",
    ),
    Guard(
        missing="a new file may have lost its name",
        file="learner/coordinator/group_files.py",
        code="            disk.sync(self._directory)\n",
        broken="",
        test=f"{GROUP_FILES}test_the_names_of_new_files_and_of_their_directory_are_on_the_disk_too",
    ),
    Guard(
        missing="the directory of new files may have lost its name",
        file="learner/coordinator/group_files.py",
        code="            disk.sync(directory.parent)\n",
        broken="",
        test=f"{GROUP_FILES}test_the_names_of_new_files_and_of_their_directory_are_on_the_disk_too",
    ),
    Guard(
        missing="damaged bytes are handed out",
        file="learner/coordinator/group_files.py",
        code="if _digest(header, payload) != place.digest:",
        broken="if False:",
        test=f"{TESTS}test_a_group_that_was_damaged_on_the_disk_is_never_handed_out",
    ),
    Guard(
        missing="what the kernel did not take is not written",
        file="learner/coordinator/group_files.py",
        code="            while left:\n",
        broken="            if left:\n",
        test=f"{GROUP_FILES}test_what_the_kernel_takes_only_in_part_is_written_whole",
    ),
    Guard(
        missing="a file is written again though a group in it is needed",
        file="learner/coordinator/group_files.py",
        code="sorted(self._full - set(needed))",
        broken="sorted(self._full)",
        test=f"{TESTS}test_the_room_of_what_was_forgotten_is_used_again_and_of_nothing_else",
    ),
    Guard(
        missing="files are never written again",
        file="learner/coordinator/group_files.py",
        code="            self._free.append(number)\n",
        broken="",
        test=f"{TESTS}test_the_room_of_what_was_forgotten_is_used_again_and_of_nothing_else",
    ),
    Guard(
        missing="after a restart groups are deleted that are needed",
        file="learner/coordinator/group_files.py",
        code="set(known) - set(needed)",
        broken="set(known)",
        test=f"{GROUP_FILES}test_files_that_are_needed_stay_as_they_are_after_a_restart",
    ),
    Guard(
        missing="after a restart what nobody needs stays for ever",
        file="learner/coordinator/group_files.py",
        code="set(known) - set(needed)",
        broken="set()",
        test=f"{TESTS}test_what_the_journal_does_not_know_is_deleted_when_it_is_opened",
    ),
    Guard(
        missing="bytes are written over that the disk still names",
        file="learner/coordinator/journal.py",
        code='            self._database.execute("COMMIT")\n',
        broken="            self._files.reuse_all_but(self._needed_files())\n"
        '            self._database.execute("COMMIT")\n',
        test=f"{TESTS}test_the_room_of_what_is_forgotten_is_used_again_only_once_the_disk_knows",
    ),
    Guard(
        missing="what was decided while the disk was busy is lost when the run is closed",
        file="learner/coordinator/service.py",
        code="            is_closed = self._done.is_set()\n            await self._keep_records()\n",
        broken="            await self._keep_records()\n            is_closed = self._done.is_set()\n",
        test="learner/coordinator/test_service.py::test_what_was_decided_before_the_run_is_closed_is_in_the_journal",
    ),
)
