// Runs every case in a process of its own, under several seeds: a violation must end it by its name, everything else must pass.
//
//   selftest [WORD]     all cases, or those whose name holds the word
#include "selftest.h"
#include <csignal>
#include <sys/wait.h>

static std::string read_all(int file) {
    std::string text;
    char part[4096];
    for (ssize_t length; (length = read(file, part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(length));
    return text;
}

[[noreturn]] static void run_child(const Case &each, int seed, int errors) {
    dup2(errors, 2);
    setenv("STANDIN_SEED", std::to_string(seed).c_str(), 1);
    setenv("STANDIN_PATIENCE_MS", "500", 1);
    std::string settings = each.environment;
    for (char *one = strtok(settings.data(), " "); one; one = strtok(nullptr, " ")) putenv(strdup(one));
    alarm(60);
    each.run();
    exit(0);
}

// Whether one of the names, separated by `|`, is what the stand-in said.
static bool names(const std::string &text, const char *dies_of) {
    std::string list = dies_of;
    for (char *one = strtok(list.data(), "|"); one; one = strtok(nullptr, "|"))
        if (text.find(std::string("standin: ") + one + ":") != std::string::npos) return true;
    return false;
}

static bool passes(const Case &each, int seed) {
    int ends[2];
    if (pipe(ends)) return false;
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        run_child(each, seed, ends[1]);
    }
    close(ends[1]);
    std::string text = read_all(ends[0]);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    bool right;
    if (!each.dies_of)
        right = status == 0 && text.empty();
    else {
        bool died = (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) || (WIFEXITED(status) && WEXITSTATUS(status) == 99);
        right = died && names(text, each.dies_of);
    }
    if (!right)
        printf("FAILED %s (seed %d): status 0x%x, expected %s, said:\n%s\n", each.name, seed, status,
               each.dies_of ? each.dies_of : "no error", text.c_str());
    return right;
}

int main(int count, char **arguments) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    int passed = 0, failed = 0;
    for (const auto *cases : {&memory_cases, &mapping_cases, &setup_cases, &order_cases, &graph_cases, &process_cases, &nccl_cases, &nccl_wrong_cases})
        for (const Case &each : *cases) {
            if (count > 1 && !strstr(each.name, arguments[1])) continue;
            bool right = true;
            for (int seed = 1; seed <= 5; seed++) right = right && passes(each, seed);
            (right ? passed : failed)++;
        }
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
